# PIIP-CT-VS-CB (C: ConvNeXt, V: DeiT), 1024/672/448 px: Mask R-CNN, 12 epochs, 16 images a step.
_base_ = ["../_base_/mask_rcnn.py", "../_base_/coco_convnext.py", "../_base_/training_1x.py"]
model = dict(
    branches=[
        dict(
            preset="convnext_base",
            pretrained="pretrained/convnext-base-224",
            resolution_px=448,
            blocks_per_stage=(3, 4, 4, 3, 3, 3, 3, 3, 3, 3, 3, 4),
            drop_path_rate=0.4,
        ),
        dict(
            preset="deit3_small",
            pretrained="pretrained/deit_3_small_224_21k.pth",
            resolution_px=672,
            window_size_tokens=(14,) * 12,
            drop_path_rate=0.05,
        ),
        dict(
            preset="convnext_tiny",
            pretrained="pretrained/convnext-tiny-224",
            resolution_px=1024,
            blocks_per_stage=(3, 4, 2, 1, 1, 1, 1, 1, 1, 1, 1, 4),
            drop_path_rate=0.3,
        ),
    ],
    interaction=dict(num_stages=12, drop_path_rate=0.4),
    pyramid=dict(kind="regular", scales=(1.0,) * 4, stages=(0, 1, 10, 11)),
)
optimizer = dict(lr=2e-4, layer_decay=0.8)
