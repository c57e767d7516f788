"""The card of an exported model: what it is, what was measured, how it is used; metadata as the hub reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from piip_scale import __version__
from piip_scale.config.run import RunConfig
from piip_scale.registry import row_of

_MOST_CLASSES_SHOWN = 100
_PER_CLASS = "per_class/"


@dataclass(frozen=True)
class Card:
    """What a card holds.

    Attributes:
        name: Of the model.
        config: Its run.
        classes: In label order.
        num_parameters: Elements.
        metrics: Measured numbers by name.
        step: Optimiser steps behind the weights; ``None`` where that is not known.
    """

    name: str
    config: RunConfig
    classes: Sequence[str]
    num_parameters: int
    metrics: Mapping[str, float]
    step: int | None


def card_text(card: Card) -> str:
    """``README.md`` of a model: YAML metadata and Markdown."""
    # JSON is YAML, and has one way to write a text.
    head = "\n".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in _metadata(card).items())
    parts = (_intro(card), _branches(card), _measured(card), _use(card), _classes(card))
    return f"---\n{head}\n---\n" + "\n".join(parts)


def _metadata(card: Card) -> dict[str, Any]:
    kind = row_of(card.config.task).hub_pipeline
    data: dict[str, Any] = {"library_name": "piip_scale", "pipeline_tag": kind}
    data["tags"] = ["piip", "parameter-inverted-image-pyramid", card.config.task]
    overall = {name: value for name, value in card.metrics.items() if not name.startswith(_PER_CLASS)}
    if overall:
        result = {
            "task": {"type": kind},
            "dataset": {"name": "held-out set of the training", "type": "held-out"},
            "metrics": [{"type": name, "name": name, "value": value} for name, value in overall.items()],
        }
        data["model-index"] = [{"name": card.name, "results": [result]}]
    return data


def _intro(card: Card) -> str:
    steps = "" if card.step is None else f", after {card.step} steps of training"
    return (
        f"# {card.name}\n\nA Parameter-Inverted Image Pyramid ([PIIP](https://arxiv.org/abs/2501.07783)) for "
        f"{card.config.task}, of {card.num_parameters:,} parameters and {len(card.classes)} classes{steps}. "
        f"Exported by piip_scale {__version__}. Who trained it on what, for which use and under which licence is for "
        "its owner to add.\n"
    )


def _branches(card: Card) -> str:
    rows = "".join(
        f"| {number} | {branch.kind} | {branch.resolution_px} | {sum(s.num_blocks for s in branch.sections)} | "
        f"{', '.join(str(s.width) for s in branch.sections)} |\n"
        for number, branch in enumerate(card.config.model.branches)
    )
    return (
        "## Network\nBranches, the largest model with the smallest image first, joined after each of "
        f"{card.config.model.interaction.num_stages} stages:\n\n"
        f"| branch | kind | image, px | blocks | width |\n|---|---|---|---|---|\n{rows}"
    )


def _measured(card: Card) -> str:
    if not card.metrics:
        return "## Measured\nNothing: the run did not evaluate these weights.\n"
    rows = "".join(f"| {_cell(name)} | {value:.4f} |\n" for name, value in card.metrics.items())
    head = "## Measured\nOn the held-out set of the training; -1 stands for no such objects.\n\n"
    return f"{head}| metric | value |\n|---|---|\n{rows}"


def _use(card: Card) -> str:
    shown = "objects" if row_of(card.config.task).finds_objects else "classes"
    return (
        "## Use\n```python\nimport piip_scale\n\n"
        f'model = piip_scale.load("{card.name}")\nprint(model.predict("photo.jpg").{shown})\n```\n'
        f"or `piip-scale predict {card.name} photo.jpg`, `piip-scale serve {card.name}`. Images are resized and "
        "normalised as `preprocessor_config.json` says.\n"
    )


def _classes(card: Card) -> str:
    names = ", ".join(_cell(name) for name in card.classes[:_MOST_CLASSES_SHOWN])
    more = ", ..." if len(card.classes) > _MOST_CLASSES_SHOWN else ""
    return f"## Classes\n{names}{more}\n"


def _cell(text: str) -> str:
    """A name inside Markdown, whatever it holds."""
    return " ".join("".join(f"\\{letter}" if letter in "\\|`*_<>[]#" else letter for letter in text).split())
