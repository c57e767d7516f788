# PIIP-H6B with units without projections and norms, and GELU by tanh.
_base_ = ["h6b.py"]
model = dict(
    branches=dict(internvit_6b=dict(activation="gelu_tanh"), huge=dict(activation="gelu_tanh")),
    interaction=dict(projection=False, norm="none"),
)
