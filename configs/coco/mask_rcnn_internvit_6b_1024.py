# InternViT-6B alone, 1024 px: Mask R-CNN, 12 epochs, 16 images a step.
_base_ = ["../_base_/mask_rcnn.py", "../_base_/coco_multi_scale.py", "../_base_/training_1x.py", "../_base_/models/internvit_6b.py"]
model = dict(branches=dict(internvit_6b=dict(resolution_px=1024)))
optimizer = dict(layer_decay=0.95)
