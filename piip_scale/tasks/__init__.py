"""What is trained: detection with mmdet's heads."""
