# The images of COCO as the mixes with ConvNeXt take them: ImageNet's own mean and deviation.
_base_ = ["coco.py"]
data = dict(
    augment=dict(
        short_edge_px=(800,),
        max_edge_px=1333,
        pad_multiple_px=32,
        mean=(123.675, 116.28, 103.53),
        std=(58.395, 57.12, 57.375),
    ),
)
