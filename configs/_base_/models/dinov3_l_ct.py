# DINOv3's ViT-L on the small image, and its ConvNeXt-T on the large one.
model = dict(
    branches=dict(
        large=dict(preset="dinov3_l", pretrained="pretrained/dinov3_l", drop_path_rate=0.1, checkpoint_blocks="auto"),
        tiny=dict(
            preset="dinov3_convnext_tiny",
            pretrained="pretrained/dinov3_convnext_tiny",
            blocks_per_stage=(3, 4, 2, 1, 1, 1, 1, 1, 1, 1, 1, 4),
            drop_path_rate=0.1,
            checkpoint_blocks="auto",
        ),
    ),
    interaction=dict(num_stages=12),
    pyramid=dict(kind="regular", scales=(1.0,) * 4, stages=(0, 1, 10, 11)),
)
