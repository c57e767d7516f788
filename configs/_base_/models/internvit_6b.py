# InternViT-6B alone.
model = dict(
    branches=dict(
        internvit_6b=dict(
            preset="internvit_6b",
            pretrained="pretrained/intern_vit_6b_224px.pth",
            drop_path_rate=0.4,
            checkpoint_blocks=True,
        ),
    ),
    pyramid=dict(norm="layernorm"),
)
