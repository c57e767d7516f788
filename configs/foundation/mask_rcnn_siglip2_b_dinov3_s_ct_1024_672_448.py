# SigLIP 2 B, DINOv3 S and ConvNeXt-T, 1024/672/448 px: Mask R-CNN, 12 epochs, 16 images a step, on one GPU of 24 GB.
_base_ = [
    "../_base_/mask_rcnn.py",
    "../_base_/coco_convnext.py",
    "../_base_/training_1x.py",
    "../_base_/models/siglip2_b_dinov3_s_ct.py",
]
model = dict(
    branches=dict(base=dict(resolution_px=448), small=dict(resolution_px=672), tiny=dict(resolution_px=1024)),
)
optimizer = dict(lr=2e-4, layer_decay=0.9)
