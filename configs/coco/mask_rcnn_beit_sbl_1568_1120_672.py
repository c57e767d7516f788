# PIIP-SBL (DeiT III, BEiT v2), 1568/1120/672 px: Mask R-CNN, 12 epochs, 16 images a step.
_base_ = ["../_base_/mask_rcnn.py", "../_base_/coco_windows.py", "../_base_/training_1x.py", "../_base_/models/sbl.py"]
model = dict(
    branches=dict(
        large=dict(
            preset="beitv2_large",
            pretrained="pretrained/beitv2_large_patch16_224_pt1k_ft21k.pth",
            resolution_px=672,
        ),
        base=dict(
            preset="beitv2_base",
            pretrained="pretrained/beitv2_base_patch16_224_pt1k_ft21k.pth",
            resolution_px=1120,
        ),
        small=dict(resolution_px=1568),
    ),
)
data = dict(augment=dict(short_edge_px=(941,), max_edge_px=1568))
