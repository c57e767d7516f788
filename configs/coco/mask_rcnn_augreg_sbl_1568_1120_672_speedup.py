# PIIP-SBL (AugReg), 1568/1120/672 px: Mask R-CNN, 12 epochs, 16 images a step; units without projections and norms, GELU by tanh.
_base_ = ["../_base_/mask_rcnn.py", "../_base_/coco.py", "../_base_/training_1x.py"]
model = dict(
    branches=[
        dict(
            preset="augreg_384_large",
            pretrained="pretrained/L_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.1-sd_0.1--imagenet2012-steps_20k-lr_0.01-res_384.pth",
            resolution_px=672,
            window_size_tokens=(28,) * 24,
            activation="gelu_tanh",
            drop_path_rate=0.4,
            checkpoint_blocks=True,
        ),
        dict(
            preset="augreg_384_base",
            pretrained="pretrained/B_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.01-res_384.pth",
            resolution_px=1120,
            window_size_tokens=(28,) * 12,
            activation="gelu_tanh",
            drop_path_rate=0.3,
            checkpoint_blocks=True,
        ),
        dict(
            preset="augreg_384_small",
            pretrained="pretrained/S_16-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.03-res_384.pth",
            resolution_px=1568,
            window_size_tokens=(28,) * 12,
            activation="gelu_tanh",
            drop_path_rate=0.2,
            checkpoint_blocks=True,
        ),
    ],
    interaction=dict(num_stages=12, drop_path_rate=0.4, projection=False, norm="none"),
)
data = dict(augment=dict(short_edge_px=(941,), max_edge_px=1568, pad_multiple_px=224))
