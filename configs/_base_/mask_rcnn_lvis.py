# mmdet's Mask R-CNN as its LVIS recipes have it: of an image 300 objects count, however unlikely.
_base_ = ["mask_rcnn.py"]
detector = dict(overrides=dict(test_cfg=dict(rcnn=dict(score_thr=1e-4, max_per_img=300))))
