# PIIP-H6B (MAE, InternViT-6B), 1024/768 px: DINO, 12 epochs, 32 images a step.
_base_ = ["../_base_/dino.py", "../_base_/coco_multi_scale.py", "../_base_/training_1x.py", "../_base_/models/h6b.py"]
model = dict(
    branches=dict(internvit_6b=dict(resolution_px=768), huge=dict(resolution_px=1024)),
    pyramid=dict(scales=(2.0, 1.0, 0.5)),
)
optimizer = dict(lr=2e-4, clip_grad_norm=0.1)
train = dict(images_per_step=32, evaluate_every_steps=3696)  # about an epoch
