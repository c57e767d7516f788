# DINOv3 B, S and ConvNeXt-T, 1024/672/448 px, on LVIS v1: Mask R-CNN, 12 epochs, 16 images a step, on one GPU of 24 GB.
_base_ = ["../_base_/mask_rcnn_lvis.py", "../_base_/lvis.py", "../_base_/training_1x.py", "../_base_/models/dinov3_small_mix.py"]
model = dict(
    branches=dict(base=dict(resolution_px=448), small=dict(resolution_px=672), tiny=dict(resolution_px=1024)),
)
optimizer = dict(lr=2e-4, layer_decay=0.9)
train = dict(evaluate_every_steps=0)
