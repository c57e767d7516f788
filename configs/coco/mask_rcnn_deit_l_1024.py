# ViT-L alone (DeiT III), 1024 px: Mask R-CNN, 12 epochs, 16 images a step.
_base_ = ["../_base_/mask_rcnn.py", "../_base_/coco_1024.py", "../_base_/training_1x.py"]
model = dict(
    branches=[
        dict(
            preset="deit3_large",
            pretrained="pretrained/deit_3_large_224_21k.pth",
            resolution_px=1024,
            window_size_tokens=(14, 14, 0) * 8,
            drop_path_rate=0.4,
        ),
    ],
    pyramid=dict(norm="layernorm"),
)
optimizer = dict(layer_decay=0.95)
