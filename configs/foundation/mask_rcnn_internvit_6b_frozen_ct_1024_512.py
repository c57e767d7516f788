# A frozen InternViT-6B at 512 px beside a trained ConvNeXt-T at 1024 px: Mask R-CNN, 12 epochs, 16 images a step, on one GPU.
_base_ = ["../_base_/mask_rcnn.py", "../_base_/coco_multi_scale.py", "../_base_/training_1x.py"]
model = dict(
    branches=dict(
        giant=dict(
            preset="internvit_6b",
            pretrained="pretrained/intern_vit_6b_224px.pth",
            resolution_px=512,
            frozen_blocks="all",
        ),
        tiny=dict(
            preset="convnext_tiny",
            pretrained="pretrained/convnext-tiny-224",
            resolution_px=1024,
            blocks_per_stage=(3, 4, 2, 1, 1, 1, 1, 1, 1, 1, 1, 4),
            drop_path_rate=0.1,
        ),
    ),
    interaction=dict(num_stages=12, direction="to_small"),
    pyramid=dict(kind="regular", scales=(1.0,) * 4, stages=(0, 1, 10, 11)),
)
optimizer = dict(lr=2e-4)
train = dict(save_frozen=False)
