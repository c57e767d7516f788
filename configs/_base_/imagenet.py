# Fine-tuning on ImageNet-1k as the released command says it, on DeiT's own defaults: 20 epochs, 1024 images a step.
# There, rates follow epochs and all parts share one floor; here they follow steps, and a part's floor is its own third.
# There is no moving average of the weights: the released run keeps one and never evaluates it.
task = "classification"
model = dict(interaction=dict(num_stages=12, drop_path_rate=0.4))
classifier = dict(separate=True, label_smoothing=0.1)
data = dict(
    train_shards="shards/imagenet/train",
    val_shards="shards/imagenet/val",
    augment=dict(
        auto_augment="rand-m9-mstd0.5-inc1",
        mix=dict(mixup_alpha=0.8, cutmix_alpha=1.0, probability=1.0, switch_probability=0.5),
        interpolation="bicubic",
        eval_crop_share=1.0,
        mean=(123.675, 116.28, 103.53),
        std=(58.395, 57.12, 57.375),
    ),
    micro_batch_size=128,
    workers=10,
)
# Interactions and heads, which no pretraining knows, learn ten times as fast; biases and norms decay as well.
optimizer = dict(lr=3e-5, weight_decay=0.1, fresh_lr_ratio=10.0, decay_all=True)
# 5 of 20 epochs of 1251 steps; from 1e-6 up, and down to 1e-5.
schedule = dict(kind="cosine", warmup_steps=6255, warmup_ratio=1 / 30, final_ratio=1 / 3)
train = dict(
    epochs=20, precision="bf16", images_per_step=1024, evaluate_every_steps=1251, checkpoint_every_steps=1251
)
