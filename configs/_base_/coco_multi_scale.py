# The images of COCO at one of many sizes, half of them cropped first, as DETR's recipes do.
_base_ = ["coco.py"]
data = dict(
    augment=dict(
        short_edge_px=(480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800),
        max_edge_px=1333,
        crop_first=dict(short_edge_px=(400, 500, 600), crop_range_px=(384, 600)),
        crop_px=(1024, 1024),
        recompute_boxes=False,
        pad_multiple_px=64,
    ),
)
