#!/usr/bin/env python
"""Measures what frozen weights in 8 bits lose and writes Markdown; ``--record`` puts it into frozen.md."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import torch
import typer
from sections.record import measure
from torch import Tensor
from torch.nn import functional

from piip_scale.config.branches import VitBranchConfig
from piip_scale.config.model import ClassifierConfig, PiipConfig
from piip_scale.models.branch import Branch
from piip_scale.models.classifier import PiipClassifier
from piip_scale.models.layers import Linear
from piip_scale.models.vit import Vit

Model = TypeVar("Model", bound=torch.nn.Module)

KINDS = ("bf16", "int8", "fp8")
# Of a channel's size: what giants trained without labels have, a few channels many times as large as the rest.
OUTLIERS, OUTLIER_CHANNELS = 30.0, 4
DEEP = VitBranchConfig(resolution_px=224, embed_dim=384, depth=40, num_heads=6, layer_scale_init=0.3)
DIGITS = VitBranchConfig(
    resolution_px=32, embed_dim=64, depth=4, num_heads=4, patch_size_px=4, pretrain_resolution_px=32, class_token=True
)
STEPS, BATCH, SEEDS = 250, 64, 3


def in_kind(model: Model, kind: str) -> Model:
    """A copy whose blocks compute in float32 with weights of linear layers rounded as a kind is."""
    model = copy.deepcopy(model)
    for layer in (part for block in model.modules() if isinstance(block, Branch) for part in block.blocks.modules()):
        if isinstance(layer, Linear) and kind == "bf16":
            layer.weight.data = layer.weight.data.bfloat16().float()
        elif isinstance(layer, Linear):
            layer.store_weight(kind)
    return model


def relative(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference over the norm."""
    return float((found - wanted).norm() / wanted.norm())


@torch.no_grad()
def depth_section() -> str:
    """Errors of a deep ViT's tokens after some of its blocks."""
    lines = ["| weights | outliers | after 1 block | 10 | 20 | 40 |", "|---|---|---|---|---|---|"]
    for outliers in (False, True):
        torch.manual_seed(0)
        model = Vit(DEEP).eval()
        if outliers:
            for name, weight in model.named_parameters():
                if name.endswith((".norm1.weight", ".norm2.weight")):
                    weight[:OUTLIER_CHANNELS] = OUTLIERS
        image = torch.randn(2, 3, 224, 224)
        for kind in KINDS:
            errors = _errors(model, in_kind(model, kind), image)
            cells = " | ".join(f"{100 * errors[block]:.2f} %" for block in (1, 10, 20, 40))
            lines.append(f"| {kind} | {'yes' if outliers else 'no'} | {cells} |")
    return "\n".join(lines)


def _errors(model: Vit, rounded: Vit, image: Tensor) -> dict[int, float]:
    state, other = model.embed(image), rounded.embed(image)
    found = {}
    for block in range(len(model.blocks)):
        state, other = model.run(state, block, block + 1), rounded.run(other, block, block + 1)
        found[block + 1] = relative(other.grid_BHWC, state.grid_BHWC)
    return found


def digits_section() -> str:
    """Accuracy of a classifier that was trained on digits, its blocks' weights rounded afterwards."""
    lines = ["| weights | accuracy | logits differ by | classes that change |", "|---|---|---|---|"]
    runs = [_digits(seed) for seed in range(SEEDS)]
    for kind in ("float32", *KINDS):
        accuracy, error, changed = (sum(run[kind][part] for run in runs) / SEEDS for part in range(3))
        lines.append(f"| {kind} | {100 * accuracy:.2f} % | {100 * error:.2f} % | {100 * changed:.2f} % |")
    return "\n".join(lines)


def _digits(seed: int) -> dict[str, tuple[float, float, float]]:
    from sklearn.datasets import load_digits

    torch.manual_seed(seed)
    digits = load_digits()
    images = functional.interpolate(torch.tensor(digits.images).float()[:, None] / 16, size=32, mode="bilinear")
    images, labels = images.expand(-1, 3, -1, -1), torch.tensor(digits.target)
    order = torch.randperm(len(labels))
    train, test = order[: -len(order) // 5], order[-len(order) // 5 :]
    model = PiipClassifier(PiipConfig(branches=(DIGITS,)), ClassifierConfig(num_classes=10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(STEPS):
        batch = train[torch.randint(len(train), (BATCH,))]
        loss = functional.cross_entropy(model.logits(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        wanted = model.logits(images[test])
        found = {"float32": wanted} | {kind: in_kind(model, kind).logits(images[test]) for kind in KINDS}
    return {kind: _compared(logits, wanted, labels[test]) for kind, logits in found.items()}


def _compared(logits: Tensor, wanted: Tensor, labels: Tensor) -> tuple[float, float, float]:
    classes = logits.argmax(1)
    accuracy, changed = (classes == labels).float().mean(), (classes != wanted.argmax(1)).float().mean()
    return float(accuracy), relative(logits, wanted), float(changed)


# A section returns its Markdown, without its heading.
SECTIONS: dict[str, Callable[[], str]] = {"Depth": depth_section, "Digits": digits_section}
_NAMES = f"Of {', '.join(SECTIONS)}; all where none is named."


def main(
    names: Annotated[list[str] | None, typer.Argument(help=_NAMES)] = None,
    record: Annotated[bool, typer.Option(help="Replace the sections in frozen.md beside this script.")] = False,
) -> None:
    """Measure and print; minutes on a CPU, and scikit-learn for its digits."""
    measure(SECTIONS, names, Path(__file__), Path(__file__).with_suffix(".md") if record else None)


if __name__ == "__main__":
    typer.run(main)
