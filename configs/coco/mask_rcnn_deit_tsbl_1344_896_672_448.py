# PIIP-TSBL (DeiT III), 1344/896/672/448 px: Mask R-CNN, 12 epochs, 16 images a step.
_base_ = ["../_base_/mask_rcnn.py", "../_base_/coco_windows.py", "../_base_/training_1x.py", "../_base_/models/tsbl.py"]
model = dict(
    branches=dict(
        large=dict(resolution_px=448),
        base=dict(resolution_px=672),
        small=dict(resolution_px=896),
        second_small=dict(resolution_px=1344),
    ),
)
data = dict(augment=dict(short_edge_px=(806,), max_edge_px=1344))
