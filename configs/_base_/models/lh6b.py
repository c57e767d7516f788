# PIIP-LH6B: InternViT-6B, MAE's ViT-H and DeiT III's ViT-L at 512, 1024 and 1536 px.
model = dict(
    branches=dict(
        internvit_6b=dict(
            preset="internvit_6b",
            pretrained="pretrained/intern_vit_6b_224px.pth",
            resolution_px=512,
            activation="gelu_tanh",
            drop_path_rate=0.4,
            checkpoint_blocks=True,
        ),
        huge=dict(
            preset="mae_huge",
            pretrained="pretrained/mae_pretrain_vit_huge.pth",
            resolution_px=1024,
            activation="gelu_tanh",
            drop_path_rate=0.4,
            checkpoint_blocks=True,
        ),
        large=dict(
            preset="deit3_384_large",
            pretrained="pretrained/deit_3_large_384_21k.pth",
            resolution_px=1536,
            activation="gelu_tanh",
            drop_path_rate=0.4,
        ),
    ),
    interaction=dict(num_stages=4, drop_path_rate=0.4, projection=False, norm="none"),
)
