"""Masks of whole images, pasted and encoded a few at a time: all of them at once are 4 bytes a mask and pixel."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pycocotools.mask as coco_mask
import torch
from torch import Tensor, nn

Rle = dict[str, object]

_PIXELS_AT_ONCE = 1 << 24
"""Of the masks that are pasted together: some 50 of COCO's images, one of a photograph."""


def encode_when_pasted(detector: nn.Module) -> None:
    """Has mask heads return run lengths of masks in place of the masks.

    ``_predict_by_feat_single`` is where mmdet (3.3.0) pastes an image's masks, and every mask head it has inherits it
    or the way it is called; it has no option for less than all of them. What it returns goes into the results as it is.

    Args:
        detector: Of mmdet, changed in place.
    """
    for module in detector.modules():
        paste = getattr(module, "_predict_by_feat_single", None)
        if paste is not None and hasattr(module, "loss_mask"):
            module._predict_by_feat_single = partial(_pasted, paste)  # type: ignore[assignment]  # a plain attribute


def _pasted(
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


def encode_masks(masks_NHW: Tensor) -> list[Rle]:
    """COCO run-length dicts of boolean masks, their counts as text."""
    return [_encoded(mask) for mask in masks_NHW.to(torch.uint8).cpu().numpy()]


def _encoded(mask_HW: Any) -> Rle:
    rle: Rle = coco_mask.encode(np.asfortranarray(mask_HW))
    counts = rle["counts"]
    assert isinstance(counts, bytes)
    return rle | {"counts": counts.decode("ascii")}
