# SigLIP 2's ViT-B on the small image, DINOv3's ViT-S in the middle and its ConvNeXt-T on the large one.
_base_ = ["dinov3_small_mix.py"]
model = dict(branches=dict(base=dict(preset="siglip2_b", pretrained="pretrained/siglip2_b")))
