# A frozen DINOv3-7B and a trained ConvNeXt-T, 1024/512 px, on LVIS v1: Mask R-CNN, 12 epochs, 16 images a step.
_base_ = ["../_base_/mask_rcnn_lvis.py", "../_base_/lvis.py", "../_base_/training_1x.py", "../_base_/models/dinov3_7b_frozen_ct.py"]
model = dict(branches=dict(giant=dict(resolution_px=512), tiny=dict(resolution_px=1024)))
optimizer = dict(lr=2e-4, layer_decay=1.0)
train = dict(evaluate_every_steps=0, save_frozen=False)
