# PIIP-SBL (DINOv2), 1568/1120/672 px: Mask R-CNN, 12 epochs, 16 images a step.
_base_ = ["../_base_/mask_rcnn.py", "../_base_/coco_windows.py", "../_base_/training_1x.py", "../_base_/models/sbl.py"]
model = dict(
    branches=dict(
        large=dict(
            preset="dinov2_large",
            pretrained="pretrained/dinov2_vitl14_pretrain.pth",
            resolution_px=672,
            checkpoint_blocks=True,
        ),
        base=dict(
            preset="dinov2_base",
            pretrained="pretrained/dinov2_vitb14_pretrain.pth",
            resolution_px=1120,
            drop_path_rate=0.3,
            checkpoint_blocks=True,
        ),
        small=dict(
            preset="dinov2_small",
            pretrained="pretrained/dinov2_vits14_pretrain.pth",
            resolution_px=1568,
            drop_path_rate=0.2,
            checkpoint_blocks=True,
        ),
    ),
)
data = dict(augment=dict(short_edge_px=(941,), max_edge_px=1568))
