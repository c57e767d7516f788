# PIIP-SBL (DeiT III, MAE), 1568/1120/672 px: Mask R-CNN, 12 epochs, 16 images a step.
_base_ = ["../_base_/mask_rcnn.py", "../_base_/coco.py", "../_base_/training_1x.py"]
model = dict(
    branches=[
        dict(
            preset="mae_large",
            pretrained="pretrained/mae_pretrain_vit_large.pth",
            resolution_px=672,
            window_size_tokens=(28,) * 24,
            drop_path_rate=0.4,
            checkpoint_blocks=True,
        ),
        dict(
            preset="mae_base",
            pretrained="pretrained/mae_pretrain_vit_base.pth",
            resolution_px=1120,
            window_size_tokens=(28,) * 12,
            drop_path_rate=0.15,
            checkpoint_blocks=True,
        ),
        dict(
            preset="deit3_small",
            pretrained="pretrained/deit_3_small_224_21k.pth",
            resolution_px=1568,
            window_size_tokens=(28,) * 12,
            drop_path_rate=0.05,
        ),
    ],
    interaction=dict(num_stages=12, drop_path_rate=0.4),
)
data = dict(augment=dict(short_edge_px=(941,), max_edge_px=1568, pad_multiple_px=224))
