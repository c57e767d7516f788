"""Augmentation of images with label maps: drawn, rounded and computed as mmsegmentation does.

Source: ``RandomResize``, ``RandomCrop``, ``RandomFlip`` and ``PhotoMetricDistortion`` of its ADE20K recipes, with one
random draw for each of theirs, in their order.
"""

from __future__ import annotations

import cv2
import numpy as np

from piip_scale.config.segmentation import DistortionConfig, SegmentationAugment
from piip_scale.data.images import Image
from piip_scale.data.reading.label_maps import IGNORED

Size = tuple[int, int]

_MAX_CROPS = 10
_HUES = 180
"""OpenCV's hue takes half degrees less than this."""


def augmented(
    pixels: Image, labels: Image, augment: SegmentationAugment, rng: np.random.Generator
) -> tuple[Image, Image, Size]:
    """An image and its label map resized, cropped, perhaps mirrored, and the colours of the image distorted.

    Args:
        pixels: RGB, uint8 (H, W, 3).
        labels: uint8 (H, W).
        augment: What may be drawn.
        rng: Draws it.

    Returns:
        Image and label map, no larger than ``crop_px``, and the size in px that both had before the crop.
    """
    factor = rng.uniform(*augment.scale_range)
    short_px, long_px = int(augment.short_edge_px * factor), int(augment.max_edge_px * factor)
    size_px = resized_px((labels.shape[0], labels.shape[1]), short_px, long_px)
    pixels, labels = resized(pixels, size_px), resized_labels(labels, size_px)
    top, left = _crop_corner(labels, augment, rng)
    height, width = augment.crop_px
    pixels, labels = (part[top : top + height, left : left + width] for part in (pixels, labels))
    if rng.random() < augment.flip_probability:
        pixels, labels = pixels[:, ::-1], labels[:, ::-1]
    if augment.distortion is not None:
        pixels = distorted(np.ascontiguousarray(pixels), augment.distortion, rng)
    return pixels, labels, size_px


def resized_px(size_px: Size, short_edge_px: int, long_edge_px: int) -> Size:
    """Height and width of an image made as large as its edges allow."""
    factor = min(long_edge_px / max(size_px), short_edge_px / min(size_px))
    height, width = (max(1, int(side * factor + 0.5)) for side in size_px)
    return height, width


def resized(pixels: Image, size_px: Size) -> Image:
    """An image of another size, interpolated between its four nearest pixels."""
    return np.asarray(cv2.resize(pixels, size_px[::-1], interpolation=cv2.INTER_LINEAR), np.uint8)


def resized_labels(labels: Image, size_px: Size) -> Image:
    """A label map of another size; each pixel takes the label of one pixel."""
    return np.asarray(cv2.resize(labels, size_px[::-1], interpolation=cv2.INTER_NEAREST), np.uint8)


def distorted(pixels: Image, config: DistortionConfig, rng: np.random.Generator) -> Image:
    """Brightness, contrast, saturation and hue, each changed in half of the images; contrast is first or last."""
    if rng.integers(2):
        pixels = _scaled(pixels, 1.0, rng.uniform(-config.brightness, config.brightness))
    contrast_first = bool(rng.integers(2))
    if contrast_first:
        pixels = _contrasted(pixels, config, rng)
    if rng.integers(2):
        hsv = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV)
        hsv[..., 1] = _scaled(np.asarray(hsv[..., 1], np.uint8), rng.uniform(*config.saturation))
        pixels = np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB), np.uint8)
    if rng.integers(2):
        hsv = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV)
        hsv[..., 0] = (hsv[..., 0].astype(int) + rng.integers(-config.hue, config.hue)) % _HUES
        pixels = np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB), np.uint8)
    return pixels if contrast_first else _contrasted(pixels, config, rng)


def _contrasted(pixels: Image, config: DistortionConfig, rng: np.random.Generator) -> Image:
    return _scaled(pixels, rng.uniform(*config.contrast)) if rng.integers(2) else pixels


def _scaled(values: Image, factor: float, offset: float = 0.0) -> Image:
    changed = values.astype(np.float32) * factor + offset
    return np.asarray(np.clip(changed, 0, 255), np.uint8)


def _crop_corner(labels: Image, augment: SegmentationAugment, rng: np.random.Generator) -> tuple[int, int]:
    """Top and left of a crop in which no class has more than its share, if one is found in time."""
    corner = _drawn_corner(labels, augment.crop_px, rng)
    if augment.max_class_share == 1:
        return corner
    for _ in range(_MAX_CROPS):
        if _is_mixed(labels, corner, augment):
            break
        corner = _drawn_corner(labels, augment.crop_px, rng)
    return corner


def _drawn_corner(labels: Image, crop_px: Size, rng: np.random.Generator) -> tuple[int, int]:
    top, left = (int(rng.integers(max(labels.shape[axis] - crop_px[axis], 0) + 1)) for axis in (0, 1))
    return top, left


def _is_mixed(labels: Image, corner: tuple[int, int], augment: SegmentationAugment) -> bool:
    (top, left), (height, width) = corner, augment.crop_px
    counts = np.bincount(labels[top : top + height, left : left + width].ravel(), minlength=IGNORED + 1)[:IGNORED]
    return bool((counts > 0).sum() > 1 and counts.max() / counts.sum() < augment.max_class_share)
