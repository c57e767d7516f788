# PIIP-SBL (AugReg), 1568/1120/672 px: Mask R-CNN, 12 epochs, 16 images a step; units without projections and norms, GELU by tanh.
_base_ = ["../_base_/mask_rcnn.py", "../_base_/coco_windows.py", "../_base_/training_1x.py", "../_base_/models/augreg_sbl.py"]
model = dict(
    branches=dict(
        large=dict(activation="gelu_tanh"),
        base=dict(activation="gelu_tanh"),
        small=dict(activation="gelu_tanh"),
    ),
    interaction=dict(projection=False, norm="none"),
)
data = dict(augment=dict(short_edge_px=(941,), max_edge_px=1568))
