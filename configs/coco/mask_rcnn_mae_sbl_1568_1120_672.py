# PIIP-SBL (DeiT III, MAE), 1568/1120/672 px: Mask R-CNN, 12 epochs, 16 images a step.
_base_ = ["../_base_/mask_rcnn.py", "../_base_/coco_windows.py", "../_base_/training_1x.py", "../_base_/models/sbl.py"]
model = dict(
    branches=dict(
        large=dict(
            preset="mae_large",
            pretrained="pretrained/mae_pretrain_vit_large.pth",
            resolution_px=672,
            checkpoint_blocks=True,
        ),
        base=dict(
            preset="mae_base",
            pretrained="pretrained/mae_pretrain_vit_base.pth",
            resolution_px=1120,
            checkpoint_blocks=True,
        ),
        small=dict(resolution_px=1568),
    ),
)
data = dict(augment=dict(short_edge_px=(941,), max_edge_px=1568))
