# InternViT-6B alone, 1024 px: Mask R-CNN, 12 epochs, 16 images a step.
_base_ = ["../_base_/mask_rcnn.py", "../_base_/coco_multi_scale.py", "../_base_/training_1x.py"]
model = dict(
    branches=[
        dict(
            preset="internvit_6b",
            pretrained="pretrained/intern_vit_6b_224px.pth",
            resolution_px=1024,
            drop_path_rate=0.4,
            checkpoint_blocks=True,
        ),
    ],
    pyramid=dict(norm="layernorm"),
)
optimizer = dict(layer_decay=0.95)
