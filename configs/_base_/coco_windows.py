# COCO for branches whose windows of 14 or 28 tokens of 16 px must fit every side.
_base_ = ["coco.py"]
data = dict(augment=dict(pad_multiple_px=224))
