"""Semantic segmentation with mmseg heads."""
