# PIIP-SBL (AugReg), 384/192/128 px: ImageNet-1k, 20 epochs, 1024 images a step.
_base_ = ["../_base_/models/imagenet_augreg_sbl.py"]
model = dict(
    branches=dict(
        large=dict(resolution_px=128, pretrain_resolution_px=128),
        base=dict(resolution_px=192, pretrain_resolution_px=192),
        small=dict(resolution_px=384, pretrain_resolution_px=384),
    ),
)
