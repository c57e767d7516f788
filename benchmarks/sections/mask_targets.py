"""What a mask head is trained on: how close to the true shape, and what it costs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import shapely
import torch
from pycocotools import mask as coco_mask

from piip_scale.data.augment.geometry import Geometry, Window
from piip_scale.data.augment.masks import Shapes
from piip_scale.data.batch import MASK_SIZE_PX
from piip_scale.tasks.detection.mini_masks import MiniMasks
from piip_scale.tasks.mmlab import BitmapMasks, PolygonMasks
from sections.record import table

TARGET_PX = 28
_IMAGE_PX = 1024
_OBJECTS = 60
_PROPOSALS = 128
_ROUNDS = 5
_TEXT = (
    f"{_OBJECTS} smooth outlines in an image of {_IMAGE_PX} px, {_PROPOSALS} proposals that miss their boxes by some 8 "
    f"% a side, targets of {TARGET_PX} x {TARGET_PX}; the truth is each cell's covered share, cut out by "
    "shapely, from a half on. Making is from the outlines to what the loader "
    "delivers; targets are cut from that; medians of CPU time, in turn."
)

Array = npt.NDArray[Any]


def section() -> str:
    """The table by size of the objects."""
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    rows = [row for sides_px in ((16, 48), (48, 128), (128, 400), (400, 700), (700, 1000)) for row in _rows(sides_px)]
    header = ["", "mean IoU", "worst IoU", "making, ms", "targets, ms", "KiB"]
    return f"{_TEXT}\n\n{table(header, rows)}"


def _rows(sides_px: tuple[int, int]) -> list[list[str]]:
    polygons, boxes, proposals, owners = made_up_shapes(sides_px, np.random.default_rng(sides_px[0]))
    truth = np.stack(
        [covered_share(polygons[i], box) >= 0.5 for i, box in zip(owners.tolist(), proposals, strict=True)]
    )
    makers: dict[str, Callable[[], Any]] = {
        "mini-masks": lambda: _mini_masks(polygons, boxes),
        "mmdet's bitmaps": lambda: _bitmaps(polygons),
        "mmdet's polygons": lambda: PolygonMasks([[p.flatten()] for p in polygons], _IMAGE_PX, _IMAGE_PX),
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in makers}
    rows = []
    found: dict[str, Array] = {}
    sizes: dict[str, int] = {}
    for _ in range(_ROUNDS):
        for name, make in makers.items():
            start = time.process_time()
            masks = make()
            made = time.process_time()
            crops = masks.crop_and_resize(proposals, (TARGET_PX, TARGET_PX), owners, "cpu")
            seconds[name].append((made - start, time.process_time() - made))
            found[name] = crops.to_ndarray().astype(bool)
            sizes[name] = _num_bytes(masks, polygons)
    for name in makers:
        ious = (found[name] & truth).sum((1, 2)) / (found[name] | truth).sum((1, 2))
        times = [f"{1e3 * statistics.median(part):.1f}" for part in zip(*seconds[name], strict=True)]
        label = f"{name}, objects of {sides_px[0]}-{sides_px[1]} px"
        rows.append([label, f"{ious.mean():.4f}", f"{ious.min():.3f}", *times, f"{sizes[name] / 1024:.0f}"])
    return rows


def made_up_shapes(sides_px: tuple[int, int], rng: np.random.Generator) -> tuple[list[Array], Array, Array, Array]:
    """Outlines, their boxes (N, 4), proposals (R, 4) and the object of each (R,)."""
    polygons = [_outline(sides_px, rng) for _ in range(_OBJECTS)]
    boxes = np.array([[*p.min(axis=0), *p.max(axis=0)] for p in polygons], np.float32)
    owners = rng.integers(_OBJECTS, size=_PROPOSALS)
    extents = np.tile(boxes[owners, 2:] - boxes[owners, :2], 2)
    proposals = np.clip(boxes[owners] + rng.normal(0, 0.08, (_PROPOSALS, 4)) * extents, 0, _IMAGE_PX)
    return polygons, boxes, proposals.astype(np.float32), owners


def _outline(sides_px: tuple[int, int], rng: np.random.Generator) -> Array:
    angles = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    reach = 1 + 0.3 * np.sin(3 * angles + rng.uniform(0, 6)) + 0.1 * np.sin(7 * angles + rng.uniform(0, 6))
    radius = rng.uniform(*sides_px, 2) / 2.8
    centre = rng.uniform(0.25 * _IMAGE_PX, 0.75 * _IMAGE_PX, 2)
    return np.asarray(centre + radius * reach[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1))


def covered_share(polygon: Array, box: Array) -> Array:
    """Of every cell over the box, the share inside the polygon, float64 (TARGET_PX, TARGET_PX)."""
    shape = shapely.Polygon((polygon - box[:2]) / (box[2:] - box[:2]) * TARGET_PX)
    shapely.prepare(shape)
    left, top = np.meshgrid(np.arange(TARGET_PX), np.arange(TARGET_PX))
    return np.asarray(shapely.area(shapely.intersection(shape, shapely.box(left, top, left + 1, top + 1))))


def _mini_masks(polygons: list[Array], boxes: Array) -> MiniMasks:
    window = Window(0, 0, _IMAGE_PX, _IMAGE_PX)
    shapes = Shapes([[polygon.ravel().tolist()] for polygon in polygons], window)
    masks = shapes.mini_masks(range(len(boxes)), boxes.astype(float), Geometry(window, (_IMAGE_PX, _IMAGE_PX)))
    return MiniMasks(torch.from_numpy(masks), torch.from_numpy(boxes), _IMAGE_PX, _IMAGE_PX)


def _bitmaps(polygons: list[Array]) -> BitmapMasks:
    """As mmdet's ``LoadAnnotations`` makes them."""
    lengths = [coco_mask.merge(coco_mask.frPyObjects([p.flatten().tolist()], _IMAGE_PX, _IMAGE_PX)) for p in polygons]
    return BitmapMasks([coco_mask.decode(one) for one in lengths], _IMAGE_PX, _IMAGE_PX)


def _num_bytes(masks: Any, polygons: list[Array]) -> int:
    if isinstance(masks, MiniMasks):
        return len(polygons) * MASK_SIZE_PX**2
    return int(masks.masks.nbytes) if isinstance(masks, BitmapMasks) else sum(p.nbytes for p in polygons)
