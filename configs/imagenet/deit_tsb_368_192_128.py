# PIIP-TSB (DeiT), 368/192/128 px: ImageNet-1k, 20 epochs, 1024 images a step.
_base_ = ["../_base_/imagenet.py"]
model = dict(
    branches=[
        dict(
            pretrained="pretrained/deit_base_patch16_224-b5f2ef4d.pth",
            resolution_px=128,
            embed_dim=768,
            depth=12,
            num_heads=12,
            pretrain_resolution_px=128,
            layer_scale_init=1.0,
            class_token=True,
            drop_path_rate=0.2,
            checkpoint_blocks=True,
        ),
        dict(
            pretrained="pretrained/deit_small_patch16_224-cd65a155.pth",
            resolution_px=192,
            embed_dim=384,
            depth=12,
            num_heads=6,
            pretrain_resolution_px=192,
            layer_scale_init=1.0,
            class_token=True,
            drop_path_rate=0.05,
            checkpoint_blocks=True,
        ),
        dict(
            pretrained="pretrained/deit_tiny_patch16_224-a1311bcf.pth",
            resolution_px=368,
            embed_dim=192,
            depth=12,
            num_heads=3,
            pretrain_resolution_px=368,
            layer_scale_init=1.0,
            class_token=True,
            drop_path_rate=0.05,
            checkpoint_blocks=True,
        ),
    ],
    interaction=dict(num_stages=12, drop_path_rate=0.4),
)
