# mmdet's Faster R-CNN, narrowed: 64 channels, three levels, few proposals.
detector = dict(
    kind="faster_rcnn",
    overrides=dict(
        neck=dict(out_channels=64, num_outs=3),
        rpn_head=dict(
            feat_channels=64,
            anchor_generator=dict(scales=[6], ratios=[1.0, 1.6]),
            loss_bbox=dict(type="SmoothL1Loss", beta=0.111),
        ),
        roi_head=dict(
            bbox_roi_extractor=dict(finest_scale=28, roi_layer=dict(sampling_ratio=2)),
            bbox_head=dict(fc_out_channels=256, reg_class_agnostic=True),
        ),
        train_cfg=dict(
            rpn=dict(sampler=dict(num=64)),
            rpn_proposal=dict(nms_pre=200, max_per_img=100),
            rcnn=dict(sampler=dict(num=32, pos_fraction=0.5)),
        ),
        test_cfg=dict(rpn=dict(nms_pre=200, max_per_img=100), rcnn=dict(max_per_img=50)),
    ),
)
