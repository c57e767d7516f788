# ADE20K in shards: 512 px crops, sliding windows of 512 px at evaluation.
data = dict(
    train_shards="shards/ade20k/train",
    val_shards="shards/ade20k/val",
    augment=dict(
        short_edge_px=512,
        max_edge_px=2048,
        scale_range=(0.5, 2.0),
        crop_px=(512, 512),
        max_class_share=0.75,
        flip_probability=0.5,
        distortion=dict(),
        mean=(123.675, 116.28, 103.53),
        std=(58.395, 57.12, 57.375),
    ),
    micro_batch_size=2,
)
