# PIIP-TSB (DeiT, DeiT III), 1568/1120/672 px: Mask R-CNN, 12 epochs, 16 images a step.
_base_ = ["../_base_/mask_rcnn.py", "../_base_/coco_windows.py", "../_base_/training_1x.py", "../_base_/models/tsb.py"]
model = dict(
    branches=dict(
        base=dict(resolution_px=672),
        small=dict(resolution_px=1120),
        tiny=dict(resolution_px=1568),
    ),
)
data = dict(augment=dict(short_edge_px=(941,), max_edge_px=1568))
