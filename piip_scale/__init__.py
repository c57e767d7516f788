"""piip_scale: train, convert, evaluate and serve Parameter-Inverted Image Pyramid detectors."""

__version__ = "0.1.0"
