# mmdet's own DINO of four scales: 900 queries, of which it keeps 300 detections; boxes near the border as released.
detector = dict(kind="dino", overrides=dict(bbox_head=dict(type="ReferenceEpsDINOHead", reference_eps=1e-3)))
