# InternViT-6B on the small image, and DINOv3's ConvNeXt-T on the large one.
model = dict(
    branches=dict(
        internvit_6b=dict(
            preset="internvit_6b",
            pretrained="pretrained/intern_vit_6b_224px.pth",
            resolution_px=512,
            drop_path_rate=0.4,
            checkpoint_blocks="auto",
        ),
        tiny=dict(
            preset="dinov3_convnext_tiny",
            pretrained="pretrained/dinov3_convnext_tiny",
            resolution_px=1024,
            blocks_per_stage=(3, 4, 2, 1, 1, 1, 1, 1, 1, 1, 1, 4),
            drop_path_rate=0.1,
            checkpoint_blocks="auto",
        ),
    ),
    interaction=dict(num_stages=12, drop_path_rate=0.4),
    pyramid=dict(kind="regular", scales=(1.0,) * 4, stages=(0, 1, 10, 11)),
)
