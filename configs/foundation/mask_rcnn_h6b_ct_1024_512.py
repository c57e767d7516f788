# PIIP with InternViT-6B and, in the place of MAE's ViT-H, DINOv3's ConvNeXt-T, 1024/512 px: Mask R-CNN, 12 epochs, 16 images a step.
_base_ = ["../_base_/mask_rcnn.py", "../_base_/coco_multi_scale.py", "../_base_/training_1x.py"]
model = dict(
    branches=dict(
        internvit_6b=dict(
            preset="internvit_6b",
            pretrained="pretrained/intern_vit_6b_224px.pth",
            resolution_px=512,
            drop_path_rate=0.4,
            checkpoint_blocks="auto",
        ),
        tiny=dict(
            preset="dinov3_convnext_tiny",
            pretrained="pretrained/dinov3_convnext_tiny",
            resolution_px=1024,
            blocks_per_stage=(3, 4, 2, 1, 1, 1, 1, 1, 1, 1, 1, 4),
            drop_path_rate=0.1,
            checkpoint_blocks="auto",
        ),
    ),
    interaction=dict(num_stages=12, drop_path_rate=0.4),
    pyramid=dict(kind="regular", scales=(1.0,) * 4, stages=(0, 1, 10, 11)),
)
