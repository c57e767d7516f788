"""How large a detector's images are in training."""

from __future__ import annotations

from piip_scale.config.detection import AugmentConfig, DetectionRun


def training_size_px(config: DetectionRun) -> tuple[int, int]:
    """Height and width of the largest canvas that a micro-batch can need."""
    return largest_canvas_px(config.data.augment, config.data.micro_batch_size)


def largest_canvas_px(augment: AugmentConfig, num_images: int) -> tuple[int, int]:
    """Height and width of the largest canvas that training can meet.

    One image is at most as long and as short as the config lets it be; of several, one may lie and another stand.
    """
    long, crop = augment.max_edge_px, augment.crop_px
    sides = (long if num_images > 1 else min(max(augment.short_edge_px), long), long)
    if crop is not None:
        sides = crop if augment.jitter_scale else (min(sides[0], crop[0]), min(sides[1], crop[1]))
    height, width = (-(-side // augment.pad_multiple_px) * augment.pad_multiple_px for side in sides)
    return height, width
