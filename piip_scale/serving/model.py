"""A trained model in three lines of Python: loaded from what ``export`` wrote, a run, or a config and weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image

from piip_scale.data.images import Image, ImageError, photo_of, read_photo
from piip_scale.errors import ModelError
from piip_scale.registry import row_of
from piip_scale.serving.looking import Looker, Looking
from piip_scale.tasks.base import Detections, Segmentation
from piip_scale.tasks.drawing import DrawingStyle
from piip_scale.tasks.trained import find_trained

ImageLike = str | Path | PIL.Image.Image | npt.NDArray[np.uint8]


@dataclass(frozen=True)
class FoundObject:
    """An object in an image.

    Attributes:
        name: Its class.
        score: 0 to 1.
        box_xyxy_px: Left, top, right and bottom edge in the upright image.
        mask_rle: COCO's run lengths of its mask, as large as the image; ``None`` of a detector without masks.
    """

    name: str
    score: float
    box_xyxy_px: tuple[float, float, float, float]
    mask_rle: dict[str, Any] | None = None

    @cached_property
    def mask_HW(self) -> npt.NDArray[np.bool_]:  # noqa: N802  # axes, as everywhere
        """The mask as booleans (H, W).

        Raises:
            ModelError: The detector finds no masks.
        """
        if self.mask_rle is None:
            raise ModelError("this detector finds boxes only", fix="train a mask_rcnn for masks")
        from pycocotools import mask as coco_mask

        decoded: npt.NDArray[np.bool_] = coco_mask.decode(self.mask_rle).astype(bool)
        return decoded


@dataclass(frozen=True)
class FoundClass:
    """A class of an image or of its pixels.

    Attributes:
        name: The class.
        share: Its probability, or the share of the image that it takes.
    """

    name: str
    share: float


@dataclass(frozen=True)
class Result:
    """What a model finds in one image.

    Attributes:
        size_px: Height and width of the image.
        objects: Of a detector, best first; empty of others.
        classes: Of a classifier the best classes, of a segmentor those of its pixels, largest first; else empty.
        labels_HW: Of a segmentor, the number of every pixel's class, uint8 (H, W); else ``None``.
        values: All of it as values for JSON, as ``predict --format json`` writes them.
        draw: Makes a picture of the image with what was found on it.
    """

    size_px: tuple[int, int]
    objects: tuple[FoundObject, ...]
    classes: tuple[FoundClass, ...]
    labels_HW: npt.NDArray[np.uint8] | None
    values: dict[str, Any]
    draw: Callable[[], PIL.Image.Image]


class Model:
    """A trained model on images: one at a time, in eval mode, on a GPU where there is one, or on the devices named.

    Attributes:
        classes: Names in label order.
        task: ``detection``, ``segmentation`` or ``classification``.
    """

    def __init__(
        self,
        source: str | Path,
        weights: str | Path | None = None,
        threshold: float = 0.5,
        devices: str | Sequence[str] | None = None,
    ) -> None:
        found = find_trained(Path(source), Path(weights) if weights is not None else None)
        self.task = found.config.task
        self._max_pixels = found.config.data.max_pixels
        looking = Looking(threshold if row_of(self.task).finds_objects else None)
        self._looker = Looker(found, looking, devices)
        self.classes = self._looker.predictor.classes

    def predict(self, image: ImageLike) -> Result:
        """What the model finds in an image.

        Args:
            image: The path of a file, of Pillow any image, or RGB uint8 (H, W, 3). Files and Pillow's images are turned
                upright as their EXIF data say.

        Raises:
            ImageError: It is absent, damaged, too large or of another shape or dtype.
        """
        pixels = pixels_of(image, self._max_pixels)
        found, predictor = self._looker.look([pixels])[0], self._looker.predictor
        size_px = (pixels.shape[0], pixels.shape[1])
        values = predictor.entry(found)
        return Result(
            size_px=size_px,
            objects=_objects(found, self.classes) if isinstance(found, Detections) else (),
            classes=tuple(FoundClass(*entry.values()) for entry in values.get("classes", ())),
            labels_HW=found.labels_HW.numpy() if isinstance(found, Segmentation) else None,
            values={"width_px": size_px[1], "height_px": size_px[0]} | values,
            draw=partial(predictor.draw, pixels, found, DrawingStyle.of_picture(size_px)),
        )


def pixels_of(image: ImageLike, max_pixels: int) -> Image:
    """An image in any of its forms as RGB uint8 (H, W, 3).

    Raises:
        ImageError: It is none, of more pixels, or of more than 8 bits a channel.
    """
    if isinstance(image, str | Path):
        return read_photo(Path(image), max_pixels=max_pixels)
    if isinstance(image, PIL.Image.Image):
        return photo_of(image, max_pixels)
    is_array = isinstance(image, np.ndarray) and image.dtype == np.uint8
    if not is_array or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        shown = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise ImageError("image", value=shown, rule="a path, an image of Pillow's, or an array uint8 (H, W, 3)")
    return np.ascontiguousarray(image)


def _objects(found: Detections, classes: Sequence[str]) -> tuple[FoundObject, ...]:
    masks: Sequence[Any] = found.masks_rle or [None] * len(found.labels)
    rows = zip(found.labels.tolist(), found.scores.tolist(), found.boxes_xyxy_px.tolist(), masks, strict=True)
    return tuple(FoundObject(classes[label], score, tuple(box), mask) for label, score, box, mask in rows)
