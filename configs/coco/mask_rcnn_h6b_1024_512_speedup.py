# PIIP-H6B (MAE, InternViT-6B), 1024/512 px: Mask R-CNN, 12 epochs, 16 images a step; units without projections and norms, GELU by tanh.
_base_ = ["../_base_/mask_rcnn.py", "../_base_/coco_multi_scale.py", "../_base_/training_1x.py"]
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
            blocks_per_stage=(2,) * 4 + (3,) * 8,
            activation="gelu_tanh",
            drop_path_rate=0.4,
            checkpoint_blocks=True,
        ),
    ],
    interaction=dict(num_stages=12, drop_path_rate=0.4, projection=False, norm="none"),
)
