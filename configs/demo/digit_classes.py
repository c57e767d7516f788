# A classifier of handwritten digits, from tools/make_digit_folders.py, that trains from scratch in minutes on two cores.
_base_ = ["../_base_/small_training.py"]
task = "classification"
model = dict(
    branches=[
        dict(resolution_px=16, embed_dim=128, depth=4, num_heads=4, patch_size_px=4, pretrain_resolution_px=16),
        dict(resolution_px=32, embed_dim=64, depth=4, num_heads=4, patch_size_px=4, pretrain_resolution_px=32),
    ],
    interaction=dict(num_stages=4, num_heads=4, gamma_init=0.1),
)
classifier = dict(separate=False, label_smoothing=0.1)
data = dict(
    train_shards="shards/digits/train",
    val_shards="shards/digits/val",
    augment=dict(
        crop_scale=(0.6, 1.0),
        flip_probability=0.0,
        auto_augment="rand-m5-n1-mstd0.5-inc1",
        mix=dict(mixup_alpha=0.2, cutmix_alpha=0.0, probability=0.5),
    ),
    micro_batch_size=16,
    num_streams=2,
    workers=1,
)
train = dict(steps=300, evaluate_every_steps=100, checkpoint_every_steps=150)
