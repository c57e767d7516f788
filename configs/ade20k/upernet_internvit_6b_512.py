# InternViT-6B alone, 512 px: UPerNet, 80,000 steps, 8 GPUs x 2 images.
_base_ = ["../_base_/upernet.py", "../_base_/ade20k.py", "../_base_/training_80k.py"]
model = dict(
    branches=[
        dict(
            preset="internvit_6b",
            pretrained="pretrained/intern_vit_6b_224px.pth",
            resolution_px=512,
            drop_path_rate=0.4,
            checkpoint_blocks=True,
            activation="gelu_tanh",
        ),
    ],
    pyramid=dict(norm="layernorm"),
)
