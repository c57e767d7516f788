# COCO at 1024 px, for one branch alone.
_base_ = ["coco.py"]
data = dict(augment=dict(short_edge_px=(614,), max_edge_px=1024, pad_multiple_px=64))
