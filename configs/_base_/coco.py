# COCO 2017 in shards, two images on each GPU. A config says what size they have.
data = dict(
    train_shards="shards/coco/train",
    val_shards="shards/coco/val",
    augment=dict(mean=(127.5, 127.5, 127.5), std=(127.5, 127.5, 127.5)),
    micro_batch_size=2,
)
