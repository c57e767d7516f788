# PIIP-H6B (MAE, InternViT-6B), 512/256 px: UPerNet, 80,000 steps, 8 GPUs x 2 images.
_base_ = ["../_base_/upernet.py", "../_base_/ade20k.py", "../_base_/training_80k.py"]
model = dict(
    branches=[
        dict(
            preset="internvit_6b",
            pretrained="pretrained/intern_vit_6b_224px.pth",
            resolution_px=256,
            drop_path_rate=0.4,
            checkpoint_blocks=True,
            activation="gelu_tanh",
        ),
        dict(
            preset="mae_huge",
            pretrained="pretrained/mae_pretrain_vit_huge.pth",
            resolution_px=512,
            blocks_per_stage=(2,) * 4 + (3,) * 8,
            drop_path_rate=0.4,
            checkpoint_blocks=True,
            activation="gelu_tanh",
        ),
    ],
    interaction=dict(num_stages=12, drop_path_rate=0.4, projection=False, norm="none"),
)
