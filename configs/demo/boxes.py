# What `make demo DATA=...` trains on a set with boxes; for a set of your own, start from here.
_base_ = ["../_base_/small_coco.py", "../_base_/small_faster_rcnn.py"]
detector = dict(overrides=dict(rpn_head=dict(anchor_generator=dict(scales=[4, 8], ratios=[0.5, 1.0, 2.0]))))
