"""A set as COCO's images are: photographs of 640 x 480 px with 7.4 outlined objects on average."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from piip_scale.data.packing.pack import pack_coco
from piip_scale.data.reading.files import json_bytes, write_bytes
from piip_scale.data.reading.shards import ShardSet

SIZE_PX = (480, 640)
OBJECTS_PER_IMAGE = 7.4
NUM_CLASSES = 80

# COCO's own, roughly: four of ten objects are small and a quarter is large, and an outline has about 25 corners.
_SIDE_PX = (8.0, 360.0)
_CORNERS = (8, 44)
_PARTS = 1.1
_QUALITY = 92
_PHOTO_SHARE = (0.45, 0.95)

Image = npt.NDArray[np.uint8]
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Photos:
    """The set, as mmdet reads it and packed.

    Attributes:
        annotations: The COCO file.
        images: The folder of its images.
        shards: Both, packed.
    """

    annotations: Path
    images: Path
    shards: ShardSet


@contextmanager
def packed_photos(num_images: int) -> Iterator[Photos]:
    """The set in a folder that goes with the block."""
    with TemporaryDirectory() as folder:
        annotations, images = _write_photos(Path(folder), num_images)
        pack_coco(annotations, images, Path(folder) / "shards", target_mb=8)
        yield Photos(annotations, images, ShardSet.open(Path(folder) / "shards"))


def _write_photos(folder: Path, num_images: int) -> tuple[Path, Path]:
    """Parts of scikit-learn's two photographs as JPEG files, with smooth outlines of random objects.

    Returns:
        The COCO file and the folder of its images.
    """
    import simplejpeg

    rng = np.random.default_rng(0)
    photos = _photographs()
    root: dict[str, Any] = {"images": [], "annotations": []}
    root["categories"] = [{"id": number + 1, "name": f"class {number}"} for number in range(NUM_CLASSES)]
    for number in range(num_images):
        name = f"{number:06d}.jpg"
        pixels = np.ascontiguousarray(_part(photos[number % len(photos)], rng))
        content = simplejpeg.encode_jpeg(pixels, quality=_QUALITY, colorsubsampling="420")
        write_bytes(folder / "images" / name, content, durable=False)
        height, width = SIZE_PX
        root["images"].append({"id": number, "file_name": name, "height": height, "width": width})
        for _ in range(rng.poisson(OBJECTS_PER_IMAGE)):
            root["annotations"].append(_object(rng) | {"id": len(root["annotations"]), "image_id": number})
    path = folder / "instances.json"
    write_bytes(path, json_bytes(root), durable=False)
    return path, folder / "images"


def _photographs() -> list[Image]:
    from sklearn.datasets import load_sample_images

    return [np.asarray(image, np.uint8) for image in load_sample_images().images]


def _part(photo: Image, rng: np.random.Generator) -> Image:
    share = rng.uniform(*_PHOTO_SHARE)
    height, width = (int(side * share) for side in photo.shape[:2])
    top, left = (int(rng.integers(have - want + 1)) for have, want in zip(photo.shape, (height, width), strict=False))
    part = photo[top : top + height, left : left + width]
    grain = rng.normal(0, 4, (*SIZE_PX, 1))
    resized = cv2.resize(part, SIZE_PX[::-1], interpolation=cv2.INTER_CUBIC)
    return np.asarray(np.clip(resized + grain, 0, 255), np.uint8)


def _object(rng: np.random.Generator) -> dict[str, Any]:
    parts = [_outline(rng) for _ in range(1 + rng.poisson(_PARTS - 1))]
    # The parts of an object lie beside each other.
    centre = parts[0].mean(axis=0)
    height, width = SIZE_PX
    moved = [part - part.mean(axis=0) * (number > 0) + centre * (number > 0) for number, part in enumerate(parts)]
    polygons = [np.round(np.clip(part, 0, (width, height)), 2) for part in moved]
    points = np.concatenate(polygons)
    (left, top), (right, bottom) = points.min(axis=0), points.max(axis=0)
    box = [float(left), float(top), float(right - left), float(bottom - top)]
    area = float(sum(cv2.contourArea(polygon.astype(np.float32)) for polygon in polygons))
    return {
        "category_id": int(rng.integers(1, NUM_CLASSES + 1)),
        "bbox": box,
        "area": area,
        "iscrowd": 0,
        "segmentation": [polygon.ravel().tolist() for polygon in polygons],
    }


def _outline(rng: np.random.Generator) -> Array:
    low, high = np.log(_SIDE_PX)
    sides = np.exp(rng.uniform(low, high)) * np.exp(rng.uniform(-0.4, 0.4, 2))
    angles = np.linspace(0, 2 * np.pi, int(rng.integers(*_CORNERS)), endpoint=False)
    reach = 1 + 0.25 * np.sin(3 * angles + rng.uniform(0, 6)) + 0.1 * np.sin(7 * angles + rng.uniform(0, 6))
    height, width = SIZE_PX
    centre = rng.uniform((0.05 * width, 0.05 * height), (0.95 * width, 0.95 * height))
    return np.asarray(np.stack([np.cos(angles), np.sin(angles)], axis=1) * reach[:, None] * sides / 2 + centre)
