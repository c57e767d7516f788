# The mixes whose branch of the highest resolution is a ViT: it has one grid, which the pyramid rescales.
_base_ = ["convnext_mix.py"]
model = dict(
    branches=dict(
        tiny=dict(
            _delete_=True,
            preset="deit_tiny",
            pretrained="pretrained/deit_tiny_patch16_224-a1311bcf.pth",
            resolution_px=1024,
            window_size_tokens=(14,) * 12,
            drop_path_rate=0.05,
        ),
    ),
    pyramid=dict(scales=(4.0, 2.0, 1.0, 0.5)),
)
