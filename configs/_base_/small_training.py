# ZeRO-3 in float32, as a CPU trains best.
optimizer = dict(lr=1e-3, weight_decay=0.05, clip_grad_norm=5.0)
schedule = dict(kind="cosine", warmup_steps=50, warmup_ratio=0.01)
train = dict(precision="fp32", log_every_steps=10)
