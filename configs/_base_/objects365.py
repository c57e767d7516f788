# Objects365 v2 in shards, its images as the mixes with ConvNeXt take them.
_base_ = ["coco_convnext.py"]
data = dict(train_shards="shards/objects365/train", val_shards="shards/objects365/val", num_classes=365)
