# PIIP-H6B: InternViT-6B and MAE's ViT-H.
model = dict(
    branches=dict(
        internvit_6b=dict(
            preset="internvit_6b",
            pretrained="pretrained/intern_vit_6b_224px.pth",
            drop_path_rate=0.4,
            checkpoint_blocks=True,
        ),
        huge=dict(
            preset="mae_huge",
            pretrained="pretrained/mae_pretrain_vit_huge.pth",
            blocks_per_stage=(2,) * 4 + (3,) * 8,
            drop_path_rate=0.4,
            checkpoint_blocks=True,
        ),
    ),
    interaction=dict(num_stages=12, drop_path_rate=0.4),
)
