# Nuclei (Data Science Bowl 2018): 300 micrographs with many small instances, masks.
_base_ = ["../demo/masks.py"]
detector = dict(
    overrides=dict(
        rpn_head=dict(anchor_generator=dict(scales=[3, 6], ratios=[1.0])),
        train_cfg=dict(rcnn=dict(sampler=dict(num=64))),
        test_cfg=dict(rpn=dict(nms_pre=500, max_per_img=300), rcnn=dict(max_per_img=200)),
    ),
)
data = dict(
    train_shards="shards/nuclei/train",
    val_shards="shards/nuclei/val",
    augment=dict(short_edge_px=(256,), jitter_scale=(0.8, 1.5), crop_px=(256, 256)),
    micro_batch_size=2,
)
