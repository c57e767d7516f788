# PIIP-SBL of DeiT III; other pretrainings put their own presets in.
model = dict(
    branches=dict(
        large=dict(
            preset="deit3_large",
            pretrained="pretrained/deit_3_large_224_21k.pth",
            window_size_tokens=(28,) * 24,
            drop_path_rate=0.4,
        ),
        base=dict(
            preset="deit3_base",
            pretrained="pretrained/deit_3_base_224_21k.pth",
            window_size_tokens=(28,) * 12,
            drop_path_rate=0.15,
        ),
        small=dict(
            preset="deit3_small",
            pretrained="pretrained/deit_3_small_224_21k.pth",
            window_size_tokens=(28,) * 12,
            drop_path_rate=0.05,
        ),
    ),
    interaction=dict(num_stages=12, drop_path_rate=0.4),
)
