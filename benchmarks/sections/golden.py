"""Tiny networks whose weights, outputs and gradients the released code itself wrote, against ours."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from piip_scale.models.official import from_official
from sections.record import table

REFERENCE = Path(__file__).parents[3] / "shared" / "reference"


@dataclass(frozen=True)
class Golden:
    """A golden file.

    Attributes:
        config: The released constructor's arguments.
        weights: By released name.
        image: float32 (B, 3, H, W).
        outputs: What the released network makes of the image.
        image_gradient: Of the outputs' means, each weighted by a ramp from -1 to 1.
    """

    config: dict[str, Any]
    weights: dict[str, Tensor]
    image: Tensor
    outputs: list[Tensor]
    image_gradient: Tensor


def read_golden(path: Path) -> Golden:
    """Reads a golden file."""
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["config"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    weights = {key.removeprefix("weight."): value for key, value in tensors.items() if key.startswith("weight.")}
    outputs = [tensors[key] for key in sorted(tensors) if key.startswith("output.")]
    return Golden(config, weights, tensors["image"], outputs, tensors["grad_image"])


def run_golden(golden: Golden, dtype: torch.dtype = torch.float32) -> tuple[tuple[Tensor, ...], Tensor]:
    """Our outputs for a golden file's image, and our gradient of the image."""
    model = from_official(golden.config, golden.weights).to(dtype)
    image = golden.image.clone().to(dtype).requires_grad_()
    returned = model(image)
    outputs = returned if isinstance(returned, tuple) else (returned,)
    ramps = [torch.linspace(-1, 1, output.numel()).view_as(output) for output in outputs]
    means = [(output * ramp).mean() for output, ramp in zip(outputs, ramps, strict=True)]
    torch.stack(means).sum().backward()
    assert image.grad is not None
    return outputs, image.grad


def section() -> str:
    """The worst errors of every golden file."""
    rows = [_row(path) for path in sorted((REFERENCE / "golden").glob("*.safetensors"))]
    head = ["golden file", "outputs", "image gradient", "of its largest value, fp32", "of its largest value, fp64"]
    return (
        "The largest absolute differences from what the released code computed, in float32 on a CPU. The gradients are "
        "small numbers, so their error is given as a share of the largest as well. A value next to 0 may pass a ReLU "
        "on its other side in one precision, which moves a patch of the gradient; not so in both.\n\n"
        + table(head, rows)
    )


def _row(path: Path) -> list[str]:
    golden = read_golden(path)
    outputs, gradient = run_golden(golden)
    largest = golden.image_gradient.abs().max().item()
    errors = [
        (gradient - golden.image_gradient).abs().max().item(),
        (run_golden(golden, torch.float64)[1] - golden.image_gradient).abs().max().item(),
    ]
    worst = max((ours - theirs).abs().max().item() for ours, theirs in zip(outputs, golden.outputs, strict=True))
    numbers = [worst, errors[0], errors[0] / largest, errors[1] / largest]
    return [path.stem, *(f"{number:.1e}" for number in numbers)]
