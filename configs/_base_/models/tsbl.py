# PIIP-TSBL of DeiT III.
# The released code builds the fourth branch as another ViT-S where the published table says ViT-T.
_base_ = ["sbl.py"]
model = dict(
    branches=dict(
        second_small=dict(
            preset="deit3_small",
            pretrained="pretrained/deit_3_small_224_21k.pth",
            window_size_tokens=(28,) * 12,
            drop_path_rate=0.05,
        ),
    ),
)
