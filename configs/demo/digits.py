# What `make demo` trains: handwritten digits on photographs, boxes and masks, 128 px.
_base_ = ["../_base_/small_piip.py", "../_base_/small_mask_rcnn.py", "../_base_/small_training.py"]
data = dict(
    train_shards="runs/demo/shards/train",
    val_shards="runs/demo/shards/val",
    augment=dict(jitter_scale=(0.8, 1.25), crop_px=(128, 128), flip_probability=0.0, pad_multiple_px=32, short_edge_px=(128,)),
    micro_batch_size=8,
    num_streams=2,
    workers=1,
)
train = dict(steps=400, evaluate_every_steps=200, checkpoint_every_steps=200)
