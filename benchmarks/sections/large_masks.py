"""Instance masks of large photographs: pasted whole as mmdet does, and as run lengths made in their boxes."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from piip_scale.tasks.detection.mask_results import Rle, encode_masks, encode_when_pasted
from piip_scale.tasks.mmlab import MODELS, ConfigDict
from sections.processes import run_ranks
from sections.record import table

_SIZES_PX = {"8 megapixels": (2448, 3264), "182 megapixels": (2800, 65000)}
# Of a box's sides, in shares of the image's.
_SMALLEST, _LARGEST = 0.02, 0.4
_MASKS, _SIDE = 8, 28
_MIB = 2**20


def section() -> str:
    """The table of both sizes, each measured in a process of its own."""
    rows = []
    for name in _SIZES_PX:
        whole, boxes = (run_ranks(1, measure, name, kind)[0] for kind in ("whole", "boxes"))
        assert whole["runs"] == boxes["runs"]
        cells = [f"{found['seconds']:.2f}" for found in (whole, boxes)]
        cells += [f"**{whole['seconds'] / boxes['seconds']:.0f}**"]
        rows.append([name, *cells, *(f"{found['mib']:.0f}" for found in (whole, boxes))])
    head = ["", "whole, s", "in boxes, s", "ratio", "whole, MiB", "in boxes, MiB"]
    return (
        f"{_MASKS} masks of a Mask R-CNN on a CPU, from scores of {_SIDE} x {_SIDE} to COCO's run lengths: pasted over "
        "the whole image by mmdet, one at a time, and encoded, against pasted and encoded in their boxes. Boxes have "
        f"sides of {_SMALLEST:.0%} to {_LARGEST:.0%} of the image's; the run lengths are the same, character by "
        "character. Seconds of CPU time, one thread; the most memory beyond what the process held before.\n\n"
        f"{table(head, rows)}"
    )


def measure(_world: Any, _device: torch.device, size: str, kind: str) -> dict[str, Any]:
    """CPU seconds, peak memory and run lengths of one way."""
    head = MODELS.build(dict(type="FCNMaskHead", num_convs=1, in_channels=4, conv_out_channels=4, num_classes=1))
    if kind == "boxes":
        encode_when_pasted(head)
    paste: Callable[..., Any] = head._predict_by_feat_single
    scores, boxes = _predictions(*_SIZES_PX[size])
    # What is done once, such as reading pycocotools, is not the masks'.
    _runs(paste, scores[:1], boxes[:1].clamp(max=60), (64, 64))
    before, start = _most_mib(), time.process_time()
    runs = [_runs(paste, scores[[n]], boxes[[n]], _SIZES_PX[size])[0] for n in range(_MASKS)]
    return {"seconds": time.process_time() - start, "mib": _most_mib() - before, "runs": runs}


def _predictions(height: int, width: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    sides = torch.tensor([width, height])
    extents = (_SMALLEST + (_LARGEST - _SMALLEST) * torch.rand(_MASKS, 2, generator=generator)) * sides
    corners = torch.rand(_MASKS, 2, generator=generator) * (sides - extents)
    # Smooth, as a network's are: noise has as many runs as rows.
    coarse = torch.randn(_MASKS, 1, 4, 4, generator=generator) * 4
    scores = torch.nn.functional.interpolate(coarse, (_SIDE, _SIDE), mode="bicubic")
    return scores, torch.cat([corners, corners + extents], 1)


def _runs(paste: Callable[..., Any], scores: Tensor, boxes: Tensor, size_px: tuple[int, int]) -> list[Rle]:
    meta = {"scale_factor": (1.0, 1.0), "ori_shape": size_px}
    labels = torch.zeros(len(scores), dtype=torch.long)
    found = paste(scores, boxes, labels, meta, ConfigDict(mask_thr_binary=0.5), True)
    return encode_masks(found) if isinstance(found, Tensor) else found


def _most_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / _MIB
