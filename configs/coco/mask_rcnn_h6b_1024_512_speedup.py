# PIIP-H6B (MAE, InternViT-6B), 1024/512 px: Mask R-CNN, 12 epochs, 16 images a step; units without projections and norms, GELU by tanh.
_base_ = ["../_base_/mask_rcnn.py", "../_base_/coco_multi_scale.py", "../_base_/training_1x.py", "../_base_/models/h6b_speedup.py"]
model = dict(branches=dict(internvit_6b=dict(resolution_px=512), huge=dict(resolution_px=1024)))
