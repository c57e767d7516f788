# LVIS v1 in shards: 1,203 classes, of which images that show rare ones come more often, as LVIS's own recipes sample.
# Shards do not hold what LVIS's file says of images: AP is measured after training, by `evaluate --metric lvis`.
data = dict(
    train_shards="shards/lvis/train",
    val_shards="shards/lvis/val",
    num_classes=1203,
    sampling=dict(kind="repeat_factor", threshold=0.001),
    augment=dict(
        short_edge_px=(640, 672, 704, 736, 768, 800),
        max_edge_px=1333,
        pad_multiple_px=32,
        mean=(123.675, 116.28, 103.53),
        std=(58.395, 57.12, 57.375),
    ),
    micro_batch_size=2,
)
