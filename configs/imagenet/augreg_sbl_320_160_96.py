# PIIP-SBL (AugReg), 320/160/96 px: ImageNet-1k, 20 epochs, 1024 images a step.
_base_ = ["../_base_/models/imagenet_augreg_sbl.py"]
model = dict(
    branches=dict(
        large=dict(resolution_px=96, pretrain_resolution_px=96),
        base=dict(resolution_px=160, pretrain_resolution_px=160),
        small=dict(resolution_px=320, pretrain_resolution_px=320),
    ),
)
