# mmdet's own DINO of four scales: 900 queries, of which it keeps 300 detections.
detector = dict(kind="dino")
