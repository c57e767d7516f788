"""The demo's data set: handwritten digits on photographs, with exact boxes and masks.

The digits (UCI, 1,797 scans of 8 x 8) and the two photographs come with scikit-learn. A digit's scan and a part of a
photograph serve either training or validation, never both.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from piip_scale.data.reading.files import json_bytes, write_bytes
from piip_scale.errors import DataError

VERSION = 1
"""Rises with every change of what is drawn, so that a folder made before is made again."""

DIGIT_SIZE_PX = (20, 56)
ROTATION_DEGREES = 12.0
STRETCH = 0.12
DIGITS_PER_SCENE = (2, 6)
MIN_VISIBLE_SHARE = 0.75
MIN_CONTRAST = 90.0
VAL_DIGIT_SHARE = 0.25
VAL_PHOTO_SHARE = 0.3
MIN_SIZE_PX = 64
JPEG_QUALITY = 95

_SUPERSAMPLING = 4
_INK_THRESHOLD = 7.0
_TRIES = 20
_LUMINANCE = np.array([0.299, 0.587, 0.114])

Image = npt.NDArray[np.uint8]
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class ScenePaths:
    """Where the written set lies."""

    images: Path
    train: Path
    val: Path


@dataclass(frozen=True)
class _Material:
    """What one split may draw from: digit scans (N, 8, 8) of 0-16, their classes (N,), parts of photographs."""

    scans: Array
    digits: Array
    photos: tuple[Image, ...]


@dataclass(frozen=True)
class _Scene:
    pixels: Image
    instance_map: Array
    digits: tuple[int, ...]


def write_scenes(folder: Path, *, num_train: int, num_val: int, size_px: int, seed: int) -> ScenePaths:
    """Writes ``images/``, ``instances_train.json`` and ``instances_val.json``; reuses a folder made the same way.

    Args:
        folder: Where to write.
        num_train: Images for training.
        num_val: Images for validation, drawn from other digits and other parts of the photographs.
        size_px: Side of the square images.
        seed: Everything drawn follows from it.

    Raises:
        DataError: An argument makes no sense, or the folder cannot be written.
    """
    if num_train < 1 or num_val < 1 or size_px < MIN_SIZE_PX:
        raise DataError(
            "size of the demo's data set",
            value=(num_train, num_val, size_px),
            rule=f"at least one image for training and one for validation, at least {MIN_SIZE_PX} px wide",
        )
    paths = ScenePaths(folder / "images", folder / "instances_train.json", folder / "instances_val.json")
    counts = {"train": num_train, "val": num_val}
    stamp, wanted = folder / "scenes.json", {**counts, "size_px": size_px, "seed": seed, "version": VERSION}
    names = {split: [f"{split}_{i:06d}.jpg" for i in range(count)] for split, count in counts.items()}
    if _is_made(stamp, wanted, [paths.train, paths.val, *(paths.images / n for ns in names.values() for n in ns)]):
        return paths
    stamp.unlink(missing_ok=True)
    first_image_id = 1
    for number, (split, path) in enumerate({"train": paths.train, "val": paths.val}.items()):
        root = _write_split(paths.images, names[split], _material(split), size_px, (seed, number), first_image_id)
        write_bytes(path, json_bytes(root))
        first_image_id += counts[split]
    write_bytes(stamp, json_bytes(wanted))
    return paths


def _is_made(stamp: Path, wanted: dict[str, int], files: Sequence[Path]) -> bool:
    try:
        return bool(json.loads(stamp.read_text()) == wanted) and all(path.is_file() for path in files)
    except (FileNotFoundError, json.JSONDecodeError):
        return False


def _write_split(
    images: Path, names: Sequence[str], material: _Material, size_px: int, seed: tuple[int, int], first_image_id: int
) -> dict[str, Any]:
    import simplejpeg

    root: dict[str, Any] = {"images": [], "annotations": []}
    root["categories"] = [{"id": digit + 1, "name": str(digit)} for digit in range(10)]
    for index, name in enumerate(names):
        scene = _draw_scene(material, size_px, np.random.default_rng([*seed, index]))
        jpeg = simplejpeg.encode_jpeg(scene.pixels, quality=JPEG_QUALITY, colorspace="RGB", colorsubsampling="444")
        write_bytes(images / name, jpeg, durable=False)
        image_id = first_image_id + index
        root["images"].append({"id": image_id, "file_name": name, "height": size_px, "width": size_px})
        for number, digit in enumerate(scene.digits):
            # Ids of all annotations of both splits differ: image ids do, and a scene has few digits.
            note = {"id": image_id * 100 + number, "image_id": image_id, "category_id": digit + 1, "iscrowd": 0}
            root["annotations"].append(note | _outline(scene.instance_map == number + 1))
    return root


def _outline(mask: Array) -> dict[str, Any]:
    from pycocotools import mask as coco_mask

    packed = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    left, top, width, height = cv2.boundingRect(mask.astype(np.uint8))
    return {
        "bbox": [left, top, width, height],
        "area": int(mask.sum()),
        "segmentation": {"size": list(mask.shape), "counts": packed["counts"].decode("ascii")},
    }


def digit_scans(split: str) -> tuple[Array, Array]:
    """A split's digits: scans (N, 8, 8) of 0-16, float32, and what they are, int64 (N,).

    Raises:
        DataError: scikit-learn, which brings them, is not installed.
    """
    bunch = _sklearn_sets().load_digits()
    # One scan in 1 / share goes to validation, class by class.
    rank_in_class = np.empty(len(bunch.target), int)
    for digit in range(10):
        rank_in_class[bunch.target == digit] = np.arange((bunch.target == digit).sum())
    chosen = (rank_in_class % round(1 / VAL_DIGIT_SHARE) == 0) == (split == "val")
    return bunch.images[chosen].astype(np.float32), bunch.target[chosen]


def _sklearn_sets() -> Any:
    try:
        from sklearn import datasets
    except ImportError as error:
        raise DataError(
            "the demo's digits and photographs", value=str(error), fix="pip install 'piip-scale[demo]' brings them"
        ) from None
    return datasets


@lru_cache(maxsize=2)
def _material(split: str) -> _Material:
    scans, digits = digit_scans(split)
    photos = []
    for photo in _sklearn_sets().load_sample_images().images:
        border = round(photo.shape[1] * (1 - VAL_PHOTO_SHARE))
        photos.append(np.ascontiguousarray(photo[:, border:] if split == "val" else photo[:, :border]))
    return _Material(scans, digits, tuple(photos))


def _draw_scene(material: _Material, size_px: int, rng: np.random.Generator) -> _Scene:
    pixels = _background(material.photos, size_px, rng).astype(np.float32)
    instance_map = np.zeros((size_px, size_px), np.int32)
    digits: list[int] = []
    areas_px: list[int] = []
    wanted = int(rng.integers(DIGITS_PER_SCENE[0], DIGITS_PER_SCENE[1], endpoint=True))
    for _ in range(_TRIES):
        choice = int(rng.integers(len(material.digits)))
        opacity = _digit_opacity(material.scans[choice], size_px, rng)
        top, left = (int(rng.integers(size_px - side, endpoint=True)) for side in opacity.shape)
        window = np.s_[top : top + opacity.shape[0], left : left + opacity.shape[1]]
        if not _leaves_others_visible(instance_map, areas_px, window, opacity >= 0.5):
            continue
        digits.append(int(material.digits[choice]))
        areas_px.append(int((opacity >= 0.5).sum()))
        instance_map[window][opacity >= 0.5] = len(digits)
        ink = _ink(pixels[window][opacity >= 0.5].mean(axis=0), rng)
        pixels[window] += (ink - pixels[window]) * opacity[..., None]
        if len(digits) == wanted:
            break
    return _Scene(np.clip(np.rint(pixels), 0, 255).astype(np.uint8), instance_map, tuple(digits))


def _background(photos: Sequence[Image], size_px: int, rng: np.random.Generator) -> Image:
    photo = photos[int(rng.integers(len(photos)))]
    side = int(rng.uniform(0.6, 1.0) * min(*photo.shape[:2], size_px))
    top, left = (int(rng.integers(extent - side, endpoint=True)) for extent in photo.shape[:2])
    crop = photo[top : top + side, left : left + side]
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    return cv2.resize(crop, (size_px, size_px), interpolation=cv2.INTER_CUBIC).astype(np.uint8)


def _digit_opacity(scan: Array, size_px: int, rng: np.random.Generator) -> Array:
    """Coverage 0-1 of a digit's smooth outline, cut to its box; float32 (H, W)."""
    height = rng.uniform(DIGIT_SIZE_PX[0], min(DIGIT_SIZE_PX[1], size_px / 2))
    stretch = rng.uniform(1 - STRETCH, 1 + STRETCH)
    scale = height / scan.shape[0]
    # Half as wide again, so that a turned digit stays inside.
    canvas = int(np.ceil(1.5 * height)) * _SUPERSAMPLING
    turn = cv2.getRotationMatrix2D((3.5, 3.5), rng.uniform(-ROTATION_DEGREES, ROTATION_DEGREES), 1.0)
    turn = np.diag([scale * stretch, scale]) @ turn * _SUPERSAMPLING
    turn[:, 2] += canvas / 2 - 3.5 * scale * _SUPERSAMPLING * np.array([stretch, 1.0])
    ink = cv2.warpAffine(scan, turn, (canvas, canvas), flags=cv2.INTER_CUBIC)
    inside = (ink > _INK_THRESHOLD).astype(np.float32)
    opacity = cv2.resize(inside, None, fx=1 / _SUPERSAMPLING, fy=1 / _SUPERSAMPLING, interpolation=cv2.INTER_AREA)
    left, top, width, height_px = cv2.boundingRect((opacity >= 0.5).astype(np.uint8))
    return opacity[top : top + height_px, left : left + width]


def _leaves_others_visible(
    instance_map: Array, areas_px: Sequence[int], window: tuple[slice, slice], covered: Array
) -> bool:
    """Whether every digit under ``covered`` still shows most of itself; ``areas_px`` are their whole areas."""
    left = instance_map.copy()
    left[window][covered] = 0
    visible_px = np.bincount(left.ravel(), minlength=len(areas_px) + 1)[1:]
    return bool((visible_px >= MIN_VISIBLE_SHARE * np.asarray(areas_px)).all())


def _ink(background_rgb: Array, rng: np.random.Generator) -> Array:
    """A random colour whose luminance stands off from what lies under it."""
    colours = rng.uniform(0, 255, (_TRIES, 3))
    contrast = np.abs((colours - background_rgb) @ _LUMINANCE)
    good = np.flatnonzero(contrast >= MIN_CONTRAST)
    return np.asarray(colours[good[0] if len(good) else contrast.argmax()])
