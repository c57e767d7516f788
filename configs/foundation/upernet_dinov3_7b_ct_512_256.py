# DINOv3-7B and ConvNeXt-T, 512/256 px: UPerNet, 80,000 steps, 16 images a step.
_base_ = ["../_base_/upernet.py", "../_base_/ade20k.py", "../_base_/training_80k.py", "../_base_/models/dinov3_7b_ct.py"]
model = dict(branches=dict(giant=dict(resolution_px=256), tiny=dict(resolution_px=512)))
