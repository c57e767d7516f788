"""Colours of an image changed by chance, as mmdet's ``PhotoMetricDistortion`` does, in whole numbers at the end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from piip_scale.config.detection import PhotometricConfig
from piip_scale.data.images import Image

Array = npt.NDArray[Any]
_LEVELS = np.arange(256, dtype=np.float32)
_FULL_CIRCLE = 360.0


@dataclass(frozen=True)
class Colours:
    """What is done to an image's colours, in this order.

    Attributes:
        brightness: Added to the channels, 0 to 255.
        contrast_first: A factor on them; 1 where contrast comes last or not at all.
        saturation: A factor on HSV's saturation; ``None`` leaves it.
        hue_degrees: Added to HSV's hue; ``None`` leaves it.
        contrast_last: A factor on the channels.
        channels: Where the new channels come from.
    """

    brightness: float
    contrast_first: float
    saturation: float | None
    hue_degrees: float | None
    contrast_last: float
    channels: tuple[int, ...]


def drawn_colours(config: PhotometricConfig, rng: np.random.Generator) -> Colours:
    """Each part takes place in half of the images; contrast is first or last.

    Source: mmdet's ``PhotoMetricDistortion``, one draw for each of its own, in its order.
    """
    contrast_first, brighter, contrasted, saturated, turned, swapped = (bool(rng.integers(2)) for _ in range(6))
    brightness = float(rng.uniform(-config.brightness, config.brightness))
    contrast = float(rng.uniform(*config.contrast))
    saturation = float(rng.uniform(*config.saturation))
    hue_degrees = float(rng.uniform(-config.hue_degrees, config.hue_degrees))
    channels = tuple(rng.permutation(3).tolist())
    return Colours(
        brightness=brightness if brighter else 0.0,
        contrast_first=contrast if contrasted and contrast_first else 1.0,
        saturation=saturation if saturated else None,
        hue_degrees=hue_degrees if turned else None,
        contrast_last=contrast if contrasted and not contrast_first else 1.0,
        channels=channels if swapped else (0, 1, 2),
    )


def recoloured(pixels: Image, colours: Colours) -> Image:
    """The image with other colours, RGB, uint8 (H, W, 3); rounded and bounded once, at the end.

    mmdet goes on with the fractions, and with what is darker than black or brighter than white.
    """
    levels = (_LEVELS + np.float32(colours.brightness)) * np.float32(colours.contrast_first)
    # Below black the way through HSV and back is none that leads back, and mmdet always goes it.
    if colours.saturation is None and colours.hue_degrees is None and levels[0] >= 0:
        new = cv2.LUT(pixels, _whole(levels, colours.contrast_last).ravel())
    else:
        hsv = np.asarray(cv2.cvtColor(cv2.LUT(pixels, levels), cv2.COLOR_RGB2HSV))
        _change_hsv(hsv, colours)
        new = _whole(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB), colours.contrast_last)
    if colours.channels != (0, 1, 2):
        new = cv2.merge([cv2.extractChannel(new, channel) for channel in colours.channels])
    return np.asarray(new, np.uint8)


def _change_hsv(hsv: Array, colours: Colours) -> None:
    """Hue from 0 to 360, saturation from 0 to 1."""
    hue, saturation = hsv[..., 0], hsv[..., 1]
    if colours.saturation is not None:
        saturation *= np.float32(colours.saturation)
        if colours.saturation > 1:
            np.clip(saturation, 0, 1, out=saturation)
    if colours.hue_degrees is not None:
        hue += np.float32(colours.hue_degrees)
        hue[hue > _FULL_CIRCLE] -= _FULL_CIRCLE
        hue[hue < 0] += _FULL_CIRCLE


def _whole(values: Any, factor: float) -> Image:
    """Values times a factor, uint8: rounded, and from 0 to 255."""
    return np.asarray(cv2.convertScaleAbs(np.maximum(values, 0), alpha=factor), np.uint8)
