# PIIP-CT-VS-CB (C: ConvNeXt, V: DeiT), 1024/672/448 px: Mask R-CNN, 12 epochs, 16 images a step.
_base_ = ["../_base_/mask_rcnn.py", "../_base_/coco_convnext.py", "../_base_/training_1x.py", "../_base_/models/convnext_mix.py"]
model = dict(
    branches=dict(
        small=dict(
            _delete_=True,
            preset="deit3_small",
            pretrained="pretrained/deit_3_small_224_21k.pth",
            resolution_px=672,
            window_size_tokens=(14,) * 12,
            drop_path_rate=0.05,
        ),
    ),
)
optimizer = dict(lr=2e-4, layer_decay=0.8)
