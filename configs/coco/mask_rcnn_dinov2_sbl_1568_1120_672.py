# PIIP-SBL (DINOv2), 1568/1120/672 px: Mask R-CNN, 12 epochs, 16 images a step.
_base_ = ["../_base_/mask_rcnn.py", "../_base_/coco.py", "../_base_/training_1x.py"]
model = dict(
    branches=[
        dict(
            preset="dinov2_large",
            pretrained="pretrained/dinov2_vitl14_pretrain.pth",
            resolution_px=672,
            window_size_tokens=(28,) * 24,
            drop_path_rate=0.4,
            checkpoint_blocks=True,
        ),
        dict(
            preset="dinov2_base",
            pretrained="pretrained/dinov2_vitb14_pretrain.pth",
            resolution_px=1120,
            window_size_tokens=(28,) * 12,
            drop_path_rate=0.3,
            checkpoint_blocks=True,
        ),
        dict(
            preset="dinov2_small",
            pretrained="pretrained/dinov2_vits14_pretrain.pth",
            resolution_px=1568,
            window_size_tokens=(28,) * 12,
            drop_path_rate=0.2,
            checkpoint_blocks=True,
        ),
    ],
    interaction=dict(num_stages=12, drop_path_rate=0.4),
)
data = dict(augment=dict(short_edge_px=(941,), max_edge_px=1568, pad_multiple_px=224))
