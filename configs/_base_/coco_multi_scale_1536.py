# The same at one and a half times the size.
_base_ = ["coco_multi_scale.py"]
data = dict(
    augment=dict(
        short_edge_px=(720, 768, 816, 864, 912, 960, 1008, 1056, 1104, 1152, 1200),
        max_edge_px=1999,
        crop_first=dict(short_edge_px=(600, 750, 900), crop_range_px=(576, 900)),
        crop_px=(1536, 1536),
    ),
)
