# C-RADIOv3's ViT-B on the small image, and DINOv3's ConvNeXt-T on the large one.
_base_ = ["dinov3_l_ct.py"]
model = dict(
    branches=dict(large=dict(preset="radio_v3_b", pretrained="pretrained/radio_v3_b")),
)
