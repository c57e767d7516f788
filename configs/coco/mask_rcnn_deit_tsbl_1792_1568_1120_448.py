# PIIP-TSBL (DeiT III), 1792/1568/1120/448 px: Mask R-CNN, 12 epochs, 16 images a step.
_base_ = ["../_base_/mask_rcnn.py", "../_base_/coco_windows.py", "../_base_/training_1x.py", "../_base_/models/tsbl.py"]
model = dict(
    branches=dict(
        large=dict(resolution_px=448),
        base=dict(resolution_px=1120),
        small=dict(resolution_px=1568),
        second_small=dict(resolution_px=1792),
    ),
)
data = dict(augment=dict(short_edge_px=(1075,), max_edge_px=1792))
