# PIIP-LH6B (DeiT III, MAE, InternViT-6B), 1536/1024/512 px: DINO, 24 epochs, 32 images a step.
_base_ = ["../_base_/dino.py", "../_base_/coco_multi_scale.py", "../_base_/training_2x.py"]
model = dict(
    branches=[
        dict(
            preset="internvit_6b",
            pretrained="pretrained/intern_vit_6b_224px.pth",
            resolution_px=512,
            activation="gelu_tanh",
            drop_path_rate=0.4,
            checkpoint_blocks=True,
        ),
        dict(
            preset="mae_huge",
            pretrained="pretrained/mae_pretrain_vit_huge.pth",
            resolution_px=1024,
            activation="gelu_tanh",
            drop_path_rate=0.4,
            checkpoint_blocks=True,
        ),
        dict(
            preset="deit3_384_large",
            pretrained="pretrained/deit_3_large_384_21k.pth",
            resolution_px=1536,
            activation="gelu_tanh",
            drop_path_rate=0.4,
        ),
    ],
    interaction=dict(num_stages=4, drop_path_rate=0.4, projection=False, norm="none"),
    pyramid=dict(scales=(2.0, 1.0, 0.5)),
)
data = dict(
    augment=dict(
        short_edge_px=(720, 768, 816, 864, 912, 960, 1008, 1056, 1104, 1152, 1200),
        max_edge_px=1999,
        crop_first=dict(short_edge_px=(600, 750, 900), crop_range_px=(576, 900)),
        crop_px=(1536, 1536),
    ),
)
optimizer = dict(lr=2e-4, clip_grad_norm=0.1)
train = dict(images_per_step=32, evaluate_every_steps=3696)  # about an epoch
