# The same network on COCO, from what it learned on Objects365 but for the layers of the classes: DINO, 12 epochs, 32 images a step.
_base_ = ["../_base_/dino.py", "../_base_/coco_convnext.py", "../_base_/training_1x.py", "../_base_/models/dinov3_small_mix.py"]
model = dict(
    branches=dict(base=dict(resolution_px=448), small=dict(resolution_px=672), tiny=dict(resolution_px=1024)),
    pretrained="pretrained/dino_dinov3_bs_ct_objects365.safetensors",
    reset=["classes"],
)
optimizer = dict(layer_decay=0.9, clip_grad_norm=0.1)
train = dict(images_per_step=32, evaluate_every_steps=3696)  # about an epoch
