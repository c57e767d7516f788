# PIIP-SBL of AugReg at 672, 1120 and 1568 px.
_base_ = ["sbl.py"]
model = dict(
    branches=dict(
        large=dict(
            preset="augreg_384_large",
            pretrained="pretrained/L_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.1-sd_0.1--imagenet2012-steps_20k-lr_0.01-res_384.pth",
            resolution_px=672,
            checkpoint_blocks=True,
        ),
        base=dict(
            preset="augreg_384_base",
            pretrained="pretrained/B_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.01-res_384.pth",
            resolution_px=1120,
            drop_path_rate=0.3,
            checkpoint_blocks=True,
        ),
        small=dict(
            preset="augreg_384_small",
            pretrained="pretrained/S_16-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.03-res_384.pth",
            resolution_px=1568,
            drop_path_rate=0.2,
            checkpoint_blocks=True,
        ),
    ),
)
