# Photographs of any size, brought to about 200 px.
_base_ = ["small_piip.py", "small_training.py"]
data = dict(
    train_shards="shards/train",
    val_shards="shards/val",
    augment=dict(short_edge_px=(160, 192, 224, 192), max_edge_px=384, pad_multiple_px=32),
    micro_batch_size=4,
    num_streams=8,
    workers=1,
)
train = dict(steps=300, evaluate_every_steps=150, checkpoint_every_steps=150)
