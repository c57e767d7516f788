# PIIP-TSBL (DeiT III), 1568/1120/672/448 px: Mask R-CNN, 12 epochs, 16 images a step.
# The released code builds the fourth branch as another ViT-S where the published table says ViT-T.
_base_ = ["../_base_/mask_rcnn.py", "../_base_/coco.py", "../_base_/training_1x.py"]
model = dict(
    branches=[
        dict(
            preset="deit3_large",
            pretrained="pretrained/deit_3_large_224_21k.pth",
            resolution_px=448,
            window_size_tokens=(28,) * 24,
            drop_path_rate=0.4,
        ),
        dict(
            preset="deit3_base",
            pretrained="pretrained/deit_3_base_224_21k.pth",
            resolution_px=672,
            window_size_tokens=(28,) * 12,
            drop_path_rate=0.15,
        ),
        dict(
            preset="deit3_small",
            pretrained="pretrained/deit_3_small_224_21k.pth",
            resolution_px=1120,
            window_size_tokens=(28,) * 12,
            drop_path_rate=0.05,
        ),
        dict(
            preset="deit3_small",
            pretrained="pretrained/deit_3_small_224_21k.pth",
            resolution_px=1568,
            window_size_tokens=(28,) * 12,
            drop_path_rate=0.05,
        ),
    ],
    interaction=dict(num_stages=12, drop_path_rate=0.4),
)
data = dict(augment=dict(short_edge_px=(941,), max_edge_px=1568, pad_multiple_px=224))
