# InternViT-6B alone, 512 px: UPerNet, 80,000 steps, 8 GPUs x 2 images.
_base_ = ["../_base_/upernet.py", "../_base_/ade20k.py", "../_base_/training_80k.py", "../_base_/models/internvit_6b.py"]
model = dict(branches=dict(internvit_6b=dict(resolution_px=512, activation="gelu_tanh")))
