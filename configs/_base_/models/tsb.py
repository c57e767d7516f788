# PIIP-TSB of DeiT III (base, small) and DeiT (tiny).
model = dict(
    branches=dict(
        base=dict(
            preset="deit3_base",
            pretrained="pretrained/deit_3_base_224_21k.pth",
            window_size_tokens=(14,) * 12,
            drop_path_rate=0.15,
        ),
        small=dict(
            preset="deit3_small",
            pretrained="pretrained/deit_3_small_224_21k.pth",
            window_size_tokens=(14,) * 12,
            drop_path_rate=0.05,
        ),
        tiny=dict(
            preset="deit_tiny",
            pretrained="pretrained/deit_tiny_patch16_224-a1311bcf.pth",
            window_size_tokens=(14,) * 12,
            drop_path_rate=0.05,
        ),
    ),
    interaction=dict(num_stages=12, drop_path_rate=0.4),
)
