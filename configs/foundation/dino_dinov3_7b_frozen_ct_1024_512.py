# A frozen DINOv3-7B and a trained ConvNeXt-T, 1024/512 px: DINO, 12 epochs, 32 images a step.
_base_ = ["../_base_/dino.py", "../_base_/coco_convnext.py", "../_base_/training_1x.py", "../_base_/models/dinov3_7b_frozen_ct.py"]
model = dict(branches=dict(giant=dict(resolution_px=512), tiny=dict(resolution_px=1024)))
optimizer = dict(lr=2e-4, layer_decay=1.0, clip_grad_norm=0.1)
train = dict(images_per_step=32, evaluate_every_steps=3696, save_frozen=False)  # about an epoch
