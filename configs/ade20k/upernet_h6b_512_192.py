# PIIP-H6B (MAE, InternViT-6B), 512/192 px: UPerNet, 80,000 steps, 8 GPUs x 2 images.
_base_ = ["../_base_/upernet.py", "../_base_/ade20k.py", "../_base_/training_80k.py", "../_base_/models/h6b_speedup.py"]
model = dict(branches=dict(internvit_6b=dict(resolution_px=192), huge=dict(resolution_px=512)))
