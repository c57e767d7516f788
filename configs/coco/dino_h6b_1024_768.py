# PIIP-H6B (MAE, InternViT-6B), 1024/768 px: DINO, 12 epochs, 32 images a step.
_base_ = ["../_base_/dino.py", "../_base_/coco_multi_scale.py", "../_base_/training_1x.py"]
model = dict(
    branches=[
        dict(
            preset="internvit_6b",
            pretrained="pretrained/intern_vit_6b_224px.pth",
            resolution_px=768,
            drop_path_rate=0.4,
            checkpoint_blocks=True,
        ),
        dict(
            preset="mae_huge",
            pretrained="pretrained/mae_pretrain_vit_huge.pth",
            resolution_px=1024,
            blocks_per_stage=(2,) * 4 + (3,) * 8,
            drop_path_rate=0.4,
            checkpoint_blocks=True,
        ),
    ],
    interaction=dict(num_stages=12, drop_path_rate=0.4),
    pyramid=dict(scales=(2.0, 1.0, 0.5)),
)
optimizer = dict(lr=2e-4, clip_grad_norm=0.1)
train = dict(images_per_step=32, evaluate_every_steps=3696)  # about an epoch
