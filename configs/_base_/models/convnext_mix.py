# Three branches at 448, 672 and 1024 px, ConvNeXts all; a mix puts ViTs in the place of some.
model = dict(
    branches=dict(
        base=dict(
            preset="convnext_base",
            pretrained="pretrained/convnext-base-224",
            resolution_px=448,
            blocks_per_stage=(3, 4, 4, 3, 3, 3, 3, 3, 3, 3, 3, 4),
            drop_path_rate=0.4,
        ),
        small=dict(
            preset="convnext_small",
            pretrained="pretrained/convnext-small-224",
            resolution_px=672,
            blocks_per_stage=(3, 4, 4, 3, 3, 3, 3, 3, 3, 3, 3, 4),
            drop_path_rate=0.3,
        ),
        tiny=dict(
            preset="convnext_tiny",
            pretrained="pretrained/convnext-tiny-224",
            resolution_px=1024,
            blocks_per_stage=(3, 4, 2, 1, 1, 1, 1, 1, 1, 1, 1, 4),
            drop_path_rate=0.3,
        ),
    ),
    interaction=dict(num_stages=12, drop_path_rate=0.4),
    pyramid=dict(kind="regular", scales=(1.0,) * 4, stages=(0, 1, 10, 11)),
)
