# The same with a mask head. One mask and one box correction for all classes: with few images they learn faster.
_base_ = ["small_faster_rcnn.py"]
detector = dict(
    kind="mask_rcnn",
    overrides=dict(
        roi_head=dict(
            mask_roi_extractor=dict(finest_scale=28, roi_layer=dict(sampling_ratio=2)),
            mask_head=dict(num_convs=2, conv_out_channels=32, class_agnostic=True),
        ),
    ),
)
