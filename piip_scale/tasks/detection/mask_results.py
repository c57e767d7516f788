"""Masks of whole images as run lengths, made inside their boxes: an image's size costs no time and no memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pycocotools.mask as coco_mask
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from piip_scale.data.reading.mask_checks import compressed_runs, mask_columns
from piip_scale.errors import ConfigError
from piip_scale.tasks.mmlab import FCNMaskHead

Rle = dict[str, object]
Positions = npt.NDArray[np.int64]

_PIXELS_AT_ONCE = 1 << 24
"""Of the masks of heads that have whole ones: some 50 of COCO's images, one of a photograph."""

# Of a box, sampled and searched in one go. On a CPU more would not fit into its caches; a GPU waits for launches.
_CPU_STRIP_PX, _GPU_STRIP_PX = 1 << 18, 1 << 24


def encode_when_pasted(detector: nn.Module) -> None:
    """Has mask heads return run lengths of masks in place of the masks.

    ``_predict_by_feat_single`` is where mmdet (3.3.0) pastes an image's masks, and every mask head it has inherits it
    or the way it is called; it has no option for less than whole images. What it returns goes into the results as it
    is.

    Args:
        detector: Of mmdet, changed in place.

    Raises:
        ConfigError: Masks are cut at a score that is none.
    """
    for module in detector.modules():
        _check_threshold(getattr(module, "test_cfg", None) or {})
        paste = getattr(module, "_predict_by_feat_single", None)
        if paste is None or not hasattr(module, "loss_mask"):
            continue
        is_fcn = isinstance(module, FCNMaskHead) and paste.__func__ is FCNMaskHead._predict_by_feat_single
        encode = partial(_encoded_in_boxes, bool(module.class_agnostic)) if is_fcn else partial(_encoded_whole, paste)
        module._predict_by_feat_single = encode  # type: ignore[assignment]  # a plain attribute


def encode_masks(masks_NHW: Tensor) -> list[Rle]:
    """COCO run-length dicts of boolean masks, their counts as text."""
    return [_encoded(mask) for mask in masks_NHW.to(torch.uint8).cpu().numpy()]


def paste_and_encode(scores_HW: Tensor, box_xyxy_px: Tensor, size_px: tuple[int, int], threshold: float) -> Rle:
    """The run lengths of a mask that was predicted on a grid over a box.

    Scores are interpolated at the centres of pixels, in the box and one pixel around it, as mmdet does on CPUs; it
    takes strips of columns, of which each pixel is what it is in the whole.

    Args:
        scores_HW: float32, 0 to 1.
        box_xyxy_px: What the grid covers, in px of the image, float32 (4,), on the same device.
        size_px: Height and width of the image.
        threshold: The least score of a pixel inside.

    Returns:
        COCO's ``{"size", "counts"}``.
    """
    height, width = size_px
    left, top, right, bottom = box_xyxy_px.tolist()
    rows, columns = _pixels_around(top, bottom, height), _pixels_around(left, right, width)
    step = max(1, (_GPU_STRIP_PX if scores_HW.is_cuda else _CPU_STRIP_PX) // max(1, len(rows)))
    strips = [columns[start : start + step] for start in range(0, len(columns), step) if rows]
    x, y = (_on_grid(pixels, *box_xyxy_px[axis::2]) for axis, pixels in enumerate((columns, rows)))
    grid = torch.empty(len(rows), min(step, len(columns)), 2, device=scores_HW.device)
    grid[..., 1] = y[:, None]
    positions = []
    for strip in strips:
        part = grid[:, : len(strip)]
        part[..., 0] = x[strip.start - columns.start : strip.stop - columns.start]
        inside = F.grid_sample(scores_HW[None, None], part[None], align_corners=False)[0, 0] >= threshold
        positions.append(_changes(inside, rows, strip, height))
    return {"size": [height, width], "counts": _counts(positions, height, width)}


def moved_mask(rle: Rle, left_top_px: tuple[int, int], size_px: tuple[int, int]) -> Rle:
    """The mask of a part of an image as one of the whole.

    Args:
        rle: COCO's ``{"size", "counts"}`` of the part.
        left_top_px: Where the part begins.
        size_px: Height and width of the whole.
    """
    box = coco_mask.toBbox(rle).astype(int).tolist()
    first, last = box[0], box[0] + box[2]
    # By columns, as run lengths are; only those that it covers.
    inside = torch.from_numpy(mask_columns(rle, first, last).astype(bool).T)
    left, top = left_top_px
    rows, columns = range(top, top + inside.shape[0]), range(left + first, left + last)
    positions = [_changes(inside, rows, columns, size_px[0])] if len(columns) else []
    return {"size": list(size_px), "counts": _counts(positions, *size_px)}


def _check_threshold(settings: dict[str, Any]) -> None:
    threshold = settings.get("mask_thr_binary", 0.5)
    if not 0 < threshold <= 1:
        raise ConfigError(
            "mask_thr_binary of the detector",
            value=threshold,
            rule="a pixel belongs to a mask from this score on, above 0 and up to 1",
            fix="correct test_cfg.rcnn.mask_thr_binary in detector.overrides",
        )


def _encoded_in_boxes(
    is_class_agnostic: bool,
    mask_preds: Tensor,
    bboxes: Tensor,
    labels: Tensor,
    img_meta: dict[str, Any],
    rcnn_test_cfg: Any,
    rescale: bool = False,
    activate_map: bool = False,
) -> list[Rle]:
    """In place of mmdet's method of the same arguments; boxes are rescaled in place, as there."""
    scale = bboxes.new_tensor(img_meta["scale_factor"]).repeat((1, 2))
    height, width = img_meta["ori_shape"][:2]
    if rescale:
        bboxes /= scale
    else:
        horizontal, vertical = scale[0, :2].tolist()
        width, height = round(width * horizontal), round(height * vertical)
    scores = mask_preds if activate_map else mask_preds.sigmoid()
    scores = scores[:, 0] if is_class_agnostic else scores[torch.arange(len(scores), device=scores.device), labels]
    threshold = rcnn_test_cfg.mask_thr_binary
    return [
        paste_and_encode(grid.float(), box, (height, width), threshold)
        for grid, box in zip(scores, bboxes, strict=True)
    ]


def _encoded_whole(
    paste: Callable[..., Tensor],
    mask_preds: Tensor,
    bboxes: Tensor,
    labels: Tensor,
    img_meta: dict[str, Any],
    *rest: Any,
    **options: Any,
) -> list[Rle]:
    height, width = img_meta["ori_shape"][:2]
    step = max(1, _PIXELS_AT_ONCE // (height * width))
    found: list[Rle] = []
    for start in range(0, len(mask_preds), step):
        some = slice(start, start + step)
        # Boxes are rescaled in place: slices are views, so that the caller's are rescaled once, as without this.
        found += encode_masks(paste(mask_preds[some], bboxes[some], labels[some], img_meta, *rest, **options))
    return found


def _pixels_around(low: float, high: float, limit: int) -> range:
    """Rows or columns of a box and one around it, inside the image; none of a box outside of it."""
    start = max(int(np.floor(low)) - 1, 0)
    return range(start, max(start, min(int(np.ceil(high)) + 1, limit)))


def _on_grid(pixels: range, low: Tensor, high: Tensor) -> Tensor:
    """Where centres of pixels lie between the edges of a box, -1 to 1."""
    centres = torch.arange(pixels.start, pixels.stop, device=low.device).to(torch.float32) + 0.5
    positions = (centres - low) / (high - low) * 2 - 1
    # Of a box without an extent, as mmdet has it.
    return positions.masked_fill_(positions.isinf(), 0)


def _changes(inside: Tensor, rows: range, columns: range, height: int) -> Positions:
    """Positions, column by column, at which a run of pixels inside begins or ends, in turn; every column ends its."""
    # Along the memory, and sorted at last: of all pixels few are edges.
    row, column = _where(inside[1:] != inside[:-1])
    top, bottom = (_where(inside[[edge]])[1] for edge in (0, -1))
    begins = (columns.start + np.arange(len(columns))) * height + rows.start
    positions: Positions = np.concatenate([begins[column] + row + 1, begins[top], begins[bottom] + len(rows)])
    positions.sort()
    return positions


def _where(is_one_RC: Tensor) -> tuple[Positions, Positions]:
    """Rows and columns of what is true."""
    if is_one_RC.is_cuda:
        row, column = is_one_RC.nonzero(as_tuple=True)
        return row.cpu().numpy(), column.cpu().numpy()
    flat = np.flatnonzero(is_one_RC.numpy())
    return flat // is_one_RC.shape[1], flat % is_one_RC.shape[1]


def _counts(positions: list[Positions], height: int, width: int) -> str:
    """Compressed run lengths; a run that goes on at the top of the next column is one."""
    edges = np.concatenate([*positions, np.zeros(0, np.int64)])
    goes_on = edges[1:-1:2] == edges[2::2]
    is_edge = np.ones(len(edges), bool)
    is_edge[1:-1:2], is_edge[2::2] = ~goes_on, ~goes_on
    counts = np.diff(np.concatenate([[0], edges[is_edge], [height * width]]))
    # The first run, of pixels outside, may have no length; the last has one.
    return compressed_runs(counts[:-1] if len(counts) > 1 and not counts[-1] else counts, height, width)


def _encoded(mask_HW: Any) -> Rle:
    rle: Rle = coco_mask.encode(np.asfortranarray(mask_HW))
    counts = rle["counts"]
    assert isinstance(counts, bytes)
    return rle | {"counts": counts.decode("ascii")}
