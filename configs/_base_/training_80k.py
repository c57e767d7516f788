# AdamW in bfloat16 over 80,000 steps; the rate falls in a straight line to nothing.
optimizer = dict(lr=4e-5, betas=(0.9, 0.999), weight_decay=0.05, layer_decay=0.95)
schedule = dict(kind="poly", power=1.0, warmup_steps=1500, warmup_ratio=1e-6)
train = dict(
    steps=80_000,
    precision="bf16",
    images_per_step=16,
    evaluate_every_steps=8000,
    checkpoint_every_steps=2000,
)
