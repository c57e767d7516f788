"""Class scores of whole images, at once or by a window that slides over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import interpolate

from piip_scale.agreement import is_distributed
from piip_scale.config.segmentation import InferenceConfig

Size = tuple[int, int]
Scorer = Callable[[Tensor], Tensor]
"""From pixels (B, 3, H, W) to scores (B, num_classes, H, W)."""


@dataclass(frozen=True)
class Window:
    """A window on an image of a batch, in px."""

    image: int
    top: int
    left: int
    height: int
    width: int


def class_scores(
    scorer: Scorer, pixels: Tensor, sizes_px: Sequence[Size], config: InferenceConfig, multiple_px: int = 1
) -> list[Tensor]:
    """Scores of each image of a batch, float32 (num_classes, H_i, W_i), without its padding.

    What an image scores does not depend on which others share its batch.

    Collective where ranks are connected: ZeRO-3 wants as many calls of the network on each of them.

    Args:
        scorer: The model.
        pixels: Normalised images, float32 (B, 3, H, W), each at the top left.
        sizes_px: Height and width of each.
        config: Whole images, or a window and its steps.
        multiple_px: Whole images are padded to multiples of it, and no further; ``pixels`` are so large at least.
    """
    if config.crop_px is None or config.stride_px is None:
        return _whole(scorer, pixels, sizes_px, multiple_px)
    return _slid(scorer, pixels, sizes_px, config.crop_px, config.stride_px)


def _whole(scorer: Scorer, pixels: Tensor, sizes_px: Sequence[Size], multiple_px: int) -> list[Tensor]:
    """Images whose padded sizes are the same go through the network together."""
    alike: dict[Size, list[int]] = {}
    for image, (height, width) in enumerate(sizes_px):
        padded = -(-height // multiple_px) * multiple_px, -(-width // multiple_px) * multiple_px
        alike.setdefault(padded, []).append(image)
    found: dict[int, Tensor] = {}
    num_more = _num_more(len(alike), pixels.device)
    for (height, width), images in alike.items():
        part = pixels[images, :, :height, :width]
        found |= zip(images, scorer(part), strict=True)
    for _ in range(num_more):
        scorer(part)
    return [found[image][:, :height, :width] for image, (height, width) in enumerate(sizes_px)]


def _slid(scorer: Scorer, pixels: Tensor, sizes_px: Sequence[Size], crop_px: Size, stride_px: Size) -> list[Tensor]:
    windows = [w for image, size in enumerate(sizes_px) for w in windows_of(image, size, crop_px, stride_px)]
    sums: list[Tensor | None] = [None] * len(sizes_px)
    counts = [pixels.new_zeros(size) for size in sizes_px]
    chunks = [windows[start : start + len(pixels)] for start in range(0, len(windows), len(pixels))]
    num_more = _num_more(len(chunks), pixels.device)
    for chunk in chunks:
        scores = scorer(_cut(pixels, chunk, crop_px))
        for window, score in zip(chunk, scores, strict=True):
            _add(sums, counts, window, score, sizes_px[window.image])
    for _ in range(num_more):
        scorer(_cut(pixels, chunks[-1], crop_px))
    # A spread network's scores are where its heads are, and pixels where it begins.
    return [total / count.to(total.device) for total, count in zip(sums, counts, strict=True) if total is not None]


def windows_of(image: int, size_px: Size, crop_px: Size, stride_px: Size) -> list[Window]:
    """Windows that cover an image, in steps of the stride; the last ones end where the image does.

    Source: mmsegmentation's ``EncoderDecoder.slide_inference``.
    """
    starts = []
    for size, crop, stride in zip(size_px, crop_px, stride_px, strict=True):
        steps = -(-max(size - crop, 0) // stride) + 1
        starts.append([max(min(step * stride, size - crop), 0) for step in range(steps)])
    height, width = (min(size, crop) for size, crop in zip(size_px, crop_px, strict=True))
    return [Window(image, top, left, height, width) for top, left in product(*starts)]


def label_map(scores: Tensor, size_px: Size) -> Tensor:
    """The class of the best score of every pixel, after scaling the scores to another size: uint8 (H, W), on the CPU.

    Args:
        scores: (num_classes, H, W).
        size_px: Height and width wanted.
    """
    best = torch.full(size_px, -torch.inf, dtype=scores.dtype, device=scores.device)
    labels = torch.zeros(size_px, dtype=torch.uint8, device=scores.device)
    # A class at a time: all of them at the size of a photograph are gigabytes.
    for label, score in enumerate(scores):
        scaled = interpolate(score[None, None], size_px, mode="bilinear", align_corners=False)[0, 0]
        better = scaled > best
        labels[better] = label
        best = torch.where(better, scaled, best)
    return labels.cpu()


def _cut(pixels: Tensor, windows: Sequence[Window], crop_px: Size) -> Tensor:
    """The windows' pixels; an image smaller than the window is padded with zeros, which are the mean colour."""
    cut = pixels.new_zeros(len(windows), pixels.shape[1], *crop_px)
    for place, window in zip(cut, windows, strict=True):
        bottom, right = window.top + window.height, window.left + window.width
        place[:, : window.height, : window.width] = pixels[window.image, :, window.top : bottom, window.left : right]
    return cut


def _add(sums: list[Tensor | None], counts: list[Tensor], window: Window, score: Tensor, size_px: Size) -> None:
    total = sums[window.image]
    if total is None:
        total = sums[window.image] = score.new_zeros(len(score), *size_px)
    rows = slice(window.top, window.top + window.height)
    columns = slice(window.left, window.left + window.width)
    total[:, rows, columns] += score[:, : window.height, : window.width]
    counts[window.image][rows, columns] += 1


def _num_more(number: int, device: torch.device) -> int:
    """How many more calls another rank makes; asked before the first of them, whose messages it would meet."""
    if not is_distributed():
        return 0
    most = torch.tensor(number, device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return int(most) - number
