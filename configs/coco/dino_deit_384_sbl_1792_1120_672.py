# PIIP-SBL (DeiT III at 384 px), 1792/1120/672 px: DINO, 36 epochs, 32 images a step.
_base_ = ["../_base_/dino.py", "../_base_/coco_multi_scale.py", "../_base_/training_3x.py", "../_base_/models/sbl.py"]
model = dict(
    branches=dict(
        large=dict(
            preset="deit3_384_large",
            pretrained="pretrained/deit_3_large_384_21k.pth",
            resolution_px=672,
            window_size_tokens=(24, 24, 0) * 8,
        ),
        base=dict(
            preset="deit3_384_base",
            pretrained="pretrained/deit_3_base_384_21k.pth",
            resolution_px=1120,
            window_size_tokens=(24, 24, 0) * 4,
        ),
        small=dict(
            preset="deit3_384_small",
            pretrained="pretrained/deit_3_small_384_21k.pth",
            resolution_px=1792,
            window_size_tokens=(24, 24, 0) * 4,
        ),
    ),
    pyramid=dict(scales=(2.0, 1.0, 0.5)),
)
data = dict(
    augment=dict(
        short_edge_px=(840, 896, 952, 1008, 1064, 1120, 1176, 1232, 1288, 1344, 1400),
        max_edge_px=2332,
        crop_first=dict(short_edge_px=(700, 875, 1050), crop_range_px=(672, 1050)),
        crop_px=(1792, 1792),
        pad_multiple_px=224,
        mean=(123.675, 116.28, 103.53),
        std=(58.395, 57.12, 57.375),
    ),
)
optimizer = dict(lr=2e-4, clip_grad_norm=0.1)
train = dict(images_per_step=32, evaluate_every_steps=3696)  # about an epoch
