# mmdet's own Mask R-CNN: an FPN of 256 channels and five levels.
detector = dict(kind="mask_rcnn")
