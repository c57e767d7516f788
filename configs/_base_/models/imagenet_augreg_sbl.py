# PIIP-SBL of AugReg as a classifier.
_base_ = ["../imagenet.py"]
model = dict(
    branches=dict(
        large=dict(
            pretrained="pretrained/L_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.1-sd_0.1--imagenet2012-steps_20k-lr_0.01-res_224.pth",
            embed_dim=1024,
            depth=24,
            num_heads=16,
            position_class_slot=True,
            class_token=True,
            drop_path_rate=0.4,
            checkpoint_blocks=True,
        ),
        base=dict(
            pretrained="pretrained/B_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.01-res_224.pth",
            embed_dim=768,
            depth=12,
            num_heads=12,
            position_class_slot=True,
            class_token=True,
            drop_path_rate=0.2,
            checkpoint_blocks=True,
        ),
        small=dict(
            pretrained="pretrained/S_16-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.03-res_224.pth",
            embed_dim=384,
            depth=12,
            num_heads=6,
            position_class_slot=True,
            class_token=True,
            drop_path_rate=0.05,
            checkpoint_blocks=True,
        ),
    ),
)
