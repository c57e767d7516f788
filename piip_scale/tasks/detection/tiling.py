"""Detecting in images too large for one look: in overlapping tiles and in the whole, each object once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torchvision.ops import box_area

from piip_scale.data.augment.geometry import Window
from piip_scale.data.images import Image
from piip_scale.errors import ConfigError
from piip_scale.tasks.base import Detections
from piip_scale.tasks.detection.mask_results import moved_mask

_SAME_OBJECT = 0.5
# How close to a tile's edge a box ends that the edge cuts off, as a share of the tile.
_EDGE_SHARE = 0.01

PredictAll = Callable[[Sequence[Image]], Sequence[Detections]]


@dataclass(frozen=True)
class Tiling:
    """How an image is cut into tiles.

    Attributes:
        tile_px: Side of a tile.
        overlap: Least share of a tile's side that the next one repeats, 0 to below 1; objects up to that size are
            whole in one of them.

    Raises:
        ConfigError: Such tiles cannot be laid.
    """

    tile_px: int
    overlap: float = 0.2

    def __post_init__(self) -> None:
        if self.tile_px < 1:
            raise ConfigError("--tile", value=self.tile_px, rule="the side of a tile in px, at least 1")
        if not 0 <= self.overlap < 1:
            raise ConfigError("--overlap", value=self.overlap, rule="a share of the tile, from 0 to below 1")


def windows(size_px: tuple[int, int], tiling: Tiling) -> list[Window]:
    """The tiles of an image of this height and width, evenly spread, none beyond its edges; one where it fits in."""
    height, width = size_px
    side = tiling.tile_px
    rows, columns = _starts(height, tiling), _starts(width, tiling)
    return [Window(left, top, min(left + side, width), min(top + side, height)) for top in rows for left in columns]


def predict_in_tiles(predict_all: PredictAll, pixels: Image, tiling: Tiling, batch_size: int = 1) -> Detections:
    """What a detector finds in an image's tiles and in the whole of it, every object once.

    Args:
        predict_all: Of a predictor.
        pixels: RGB uint8 (H, W, 3).
        tiling: The tiles.
        batch_size: So many tiles are looked at together.

    Returns:
        Detections in px of the image, best first; masks are of its size.
    """
    size_px = (pixels.shape[0], pixels.shape[1])
    looks = windows(size_px, tiling)
    if len(looks) == 1:
        return predict_all([pixels])[0]
    found = list(_looked_at(predict_all, pixels, looks, batch_size))
    height, width = size_px
    # What is larger than a tile is whole in no tile.
    return merge([*found, predict_all([pixels])[0]], [*looks, Window(0, 0, width, height)], size_px)


def merge(found: Sequence[Detections], looks: Sequence[Window], size_px: tuple[int, int]) -> Detections:
    """Detections of several looks at one image, every object once.

    Two of one class in different looks are one object where they overlap by half of both (IoU); where a tile's edge
    cuts one off, by half of the smaller. Whole ones are kept before cut ones, whole ones by score, cut ones by area.
    Those of a single look are left as the detector has them. Unlike plain NMS over the tiles, a well scored fragment
    does not take the place of its object.

    Args:
        found: In px of their look.
        looks: The windows they are of.
        size_px: Height and width of the image.

    Returns:
        Detections in px of the image, best first.
    """
    counts = torch.tensor([len(one.labels) for one in found])
    look = torch.repeat_interleave(torch.arange(len(found)), counts)
    corners = torch.tensor([[window.left, window.top] * 2 for window in looks], dtype=torch.float32)
    boxes = torch.cat([one.boxes_xyxy_px for one in found]) + corners[look]
    scores, labels = (torch.cat([getattr(one, name) for one in found]) for name in ("scores", "labels"))
    is_cut = torch.cat([cut_off(w, b, size_px) for w, b in zip(looks, boxes.split(counts.tolist()), strict=True)])
    kept = _distinct(boxes, labels, look, is_cut, torch.where(is_cut, box_area(boxes), scores))
    kept = kept[scores[kept].argsort(descending=True, stable=True)]
    merged = replace(found[-1], boxes_xyxy_px=boxes[kept], scores=scores[kept], labels=labels[kept])
    if found[-1].masks_rle is None:
        return merged
    masks = [(mask, window) for one, window in zip(found, looks, strict=True) for mask in one.masks_rle or ()]
    chosen = [masks[index] for index in kept.tolist()]
    return replace(merged, masks_rle=[moved_mask(mask, (at.left, at.top), size_px) for mask, at in chosen])


def cut_off(window: Window, boxes_xyxy_px: Tensor, size_px: tuple[int, int]) -> Tensor:
    """Which boxes, float32 (N, 4) in px of the image, end at an edge beyond which the image goes on: bool (N,)."""
    height, width = size_px
    edge_px = _EDGE_SHARE * max(window.right - window.left, window.bottom - window.top)
    left, top, right, bottom = boxes_xyxy_px.unbind(1)
    cut = (left < window.left + edge_px) & (window.left > 0)
    cut |= (top < window.top + edge_px) & (window.top > 0)
    cut |= (right > window.right - edge_px) & (window.right < width)
    return cut | ((bottom > window.bottom - edge_px) & (window.bottom < height))


def _starts(length_px: int, tiling: Tiling) -> list[int]:
    room = length_px - tiling.tile_px
    if room <= 0:
        return [0]
    steps = math.ceil(room / max(1.0, tiling.tile_px * (1 - tiling.overlap)))
    return [round(room * step / steps) for step in range(steps + 1)]


def _looked_at(
    predict_all: PredictAll, pixels: Image, looks: Sequence[Window], batch_size: int
) -> Iterator[Detections]:
    for start in range(0, len(looks), batch_size):
        some = looks[start : start + batch_size]
        yield from predict_all([pixels[at.top : at.bottom, at.left : at.right] for at in some])


def _distinct(boxes: Tensor, labels: Tensor, look: Tensor, is_cut: Tensor, rank: Tensor) -> Tensor:
    """The indices, int64 (M,), of what no better one of another look stands for."""
    by_rank = rank.argsort(descending=True, stable=True)
    order = by_rank[is_cut[by_rank].long().argsort(stable=True)]
    is_gone = torch.zeros(len(order), dtype=torch.bool)
    areas = box_area(boxes)
    for index in order.tolist():
        if is_gone[index]:
            continue
        rivals = (labels == labels[index]) & (look != look[index])
        shared = _intersections(boxes[index], boxes)
        either_cut = is_cut | is_cut[index]
        smaller, union = areas.minimum(areas[index]), areas + areas[index] - shared
        is_same = shared > _SAME_OBJECT * torch.where(either_cut, smaller, union)
        # Never one that was kept before: it would have done away with this one.
        is_gone |= rivals & is_same
    return order[~is_gone[order]]


def _intersections(box: Tensor, boxes: Tensor) -> Tensor:
    sides = torch.minimum(box[2:], boxes[:, 2:]) - torch.maximum(box[:2], boxes[:, :2])
    return sides.clamp(min=0).prod(1)
