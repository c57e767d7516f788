# DINOv3 B, S and ConvNeXt-T, 1024/672/448 px, on Objects365 v2: DINO, 12 epochs, 64 images a step.
_base_ = ["../_base_/dino.py", "../_base_/objects365.py", "../_base_/training_1x.py", "../_base_/models/dinov3_small_mix.py"]
model = dict(
    branches=dict(base=dict(resolution_px=448), small=dict(resolution_px=672), tiny=dict(resolution_px=1024)),
)
optimizer = dict(lr=2e-4, layer_decay=0.9, clip_grad_norm=0.1)
train = dict(images_per_step=64, evaluate_every_steps=27_223)  # about an epoch
