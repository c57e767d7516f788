# AdamW in bfloat16 over 12 epochs; the rate falls tenfold after the 8th and the 11th.
optimizer = dict(lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05, layer_decay=0.85)
schedule = dict(kind="step", warmup_steps=500, warmup_ratio=0.001, milestones=(8 / 12, 11 / 12), gamma=0.1)
train = dict(
    epochs=12,
    precision="bf16",
    images_per_step=16,
    evaluate_every_steps=7392,  # about an epoch
    checkpoint_every_steps=1000,
)
