# Blood cells (BCCD): 364 photographs, three classes, boxes.
_base_ = ["../demo/boxes.py"]
data = dict(train_shards="shards/bccd/train", val_shards="shards/bccd/val")
