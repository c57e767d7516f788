# PIIP-LH6B (DeiT III, MAE, InternViT-6B), 1536/1024/512 px: DINO, 24 epochs, 32 images a step.
_base_ = ["../_base_/dino.py", "../_base_/coco_multi_scale_1536.py", "../_base_/training_2x.py", "../_base_/models/lh6b.py"]
model = dict(pyramid=dict(scales=(2.0, 1.0, 0.5)))
optimizer = dict(lr=2e-4, clip_grad_norm=0.1)
train = dict(images_per_step=32, evaluate_every_steps=3696)  # about an epoch
