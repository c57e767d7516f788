# DINOv3's ViT-B on the small image, ViT-S in the middle and ConvNeXt-T on the large one.
model = dict(
    branches=dict(
        base=dict(preset="dinov3_b", pretrained="pretrained/dinov3_b", drop_path_rate=0.1, checkpoint_blocks="auto"),
        small=dict(preset="dinov3_s", pretrained="pretrained/dinov3_s", drop_path_rate=0.1, checkpoint_blocks="auto"),
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
