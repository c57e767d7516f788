# As dinov3_7b_ct, and the ViT-7B never moves: it runs without a graph, and checkpoints leave it to its file.
_base_ = ["dinov3_7b_ct.py"]
model = dict(
    branches=dict(giant=dict(frozen_blocks="all", checkpoint_blocks=False)),
    interaction=dict(direction="to_small", checkpoint_units=False),
)
