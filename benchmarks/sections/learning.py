"""Does PIIP learn more than its own branches alone, at equal computation? Trainings from random weights, small sets."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from piip_scale.config.loading import load_config
from piip_scale.config.run import RunConfig
from piip_scale.models.counting import PartCount
from piip_scale.tasks.counting import counting_of
from sections.record import table

FOLDER = Path(os.environ.get("LEARNING_FOLDER", "learning"))
"""Where the sets are, packed as real_sets.md says, and where trainings go: one that has ended is not run again."""
_CONFIGS = Path(__file__).parents[2] / "configs"
_SEEDS = (0, 1, 2)
_ALONE = {"PIIP": None, "its large branch alone": 0, "its small branch alone": 1}
_LARGEST_FACTOR = 2.5
_PATCHES_PX = 16
"""Two patches, which the pyramid's coarsest level halves: images are padded to a multiple of it and no further."""
_MEGA, _GIGA = 1e6, 1e9

Overrides = Mapping[str, Any]
"""Values of a config by their keys, as ``--set`` takes them."""


@dataclass(frozen=True)
class LearningSet:
    """A set, its recipe and what is read off.

    Attributes:
        recipe: A config below ``configs/`` whose branch 0 reads a small image and whose branch 1 the large one.
        shards: Where its packed images lie, below ``FOLDER``.
        metric: Key in an evaluation's record.
        steps: Of a training by one process.
        side_step_px: Sides of a single branch's image are multiples of it.
        scaled: What else of the config follows the side of the network's input, by its factor.
    """

    recipe: str
    shards: str
    metric: str
    steps: int
    side_step_px: int
    scaled: Callable[[float], Overrides]

    def config(self, overrides: Overrides) -> RunConfig:
        """The recipe with some of its values replaced."""
        return load_config(_CONFIGS / self.recipe, _texts(overrides))


def _crops(factor: float) -> Overrides:
    edges = {"short_edge_px": round(256 * factor), "max_edge_px": round(384 * factor)}
    augment = edges | {"crop_px": (round(128 * factor),) * 2, "pad_multiple_px": _PATCHES_PX}
    return {f"data.augment.{key}": value for key, value in augment.items()}


def _photographs(factor: float) -> Overrides:
    # Anchors and the levels of boxes follow the image, so that an object meets the same ones whatever the network.
    return {
        "data.augment.short_edge_px": tuple(round(edge * factor) for edge in (160, 192, 224, 192)),
        "data.augment.max_edge_px": round(384 * factor),
        "data.augment.pad_multiple_px": _PATCHES_PX,
        "detector.overrides.rpn_head.anchor_generator.scales": [4 * factor, 8 * factor],
        "detector.overrides.roi_head.bbox_roi_extractor.finest_scale": 28 * factor,
    }


SETS = {
    "Nuclei": LearningSet("nuclei/upernet_small.py", "nuclei_maps", "eval/miou", 300, 16, _crops),
    "Blood cells": LearningSet("bccd/faster_rcnn_small.py", "bccd", "eval/box_ap50", 120, 16, _photographs),
    "Digits": LearningSet("demo/digit_classes.py", "digits", "eval/top1_accuracy", 300, 4, lambda factor: {}),
}


def section(name: str) -> str:
    """Trains each network with each seed, unless it has been, and compares; half an hour of a core a set."""
    chosen = SETS[name]
    recipe = chosen.config({})
    rows = [_row(chosen, label, _overrides(chosen, recipe, index)) for label, index in _ALONE.items()]
    names = [
        "network",
        "image, px",
        "parameters (M)",
        "GMACs",
        f"`{chosen.metric.removeprefix('eval/')}`, mean",
        "spread",
    ]
    return (
        f"`configs/{chosen.recipe}`: {chosen.steps} steps of {recipe.data.micro_batch_size} images by one process.\n\n"
        f"{table([*names, *(f'seed {seed}' for seed in _SEEDS)], rows)}"
    )


def _overrides(chosen: LearningSet, recipe: RunConfig, alone: int | None) -> Overrides:
    """What makes the recipe the network of one branch, at the side where that computes what the whole network does."""
    if alone is None:
        return {}
    widest = round(_input_px(recipe) * _LARGEST_FACTOR)
    sides = range(2 * chosen.side_step_px, widest, chosen.side_step_px)
    candidates = [_single(chosen, recipe, alone, side_px) for side_px in sides]
    whole = _macs(recipe)
    return min(candidates, key=lambda overrides: abs(_macs(chosen.config(overrides)) - whole))


def _single(chosen: LearningSet, recipe: RunConfig, index: int, side_px: int) -> Overrides:
    branch = recipe.model.branches[index].model_dump(exclude_unset=True)
    branch |= {"resolution_px": side_px, "pretrain_resolution_px": side_px}
    return {"model.branches": [branch], **chosen.scaled(side_px / _input_px(recipe))}


def _input_px(config: RunConfig) -> int:
    return config.model.branches[-1].resolution_px


def _macs(config: RunConfig) -> int:
    return sum(part.total_macs for part in _parts(config))


def _parts(config: RunConfig) -> tuple[PartCount, ...]:
    side_px = _input_px(config)
    return counting_of(config, num_classes=1).network(side_px, side_px, training=False)


def _row(chosen: LearningSet, label: str, overrides: Overrides) -> list[str]:
    config = chosen.config(overrides)
    scores = [_score(chosen, label, overrides, seed) for seed in _SEEDS]
    parameters = sum(part.parameters for part in _parts(config)) / _MEGA
    sides = "/".join(str(branch.resolution_px) for branch in config.model.branches)
    spread = [f"{statistics.mean(scores):.3f}", f"{statistics.stdev(scores):.3f}"]
    return [label, sides, f"{parameters:.2f}", f"{_macs(config) / _GIGA:.3f}", *spread, *map("{:.3f}".format, scores)]


def _score(chosen: LearningSet, label: str, overrides: Overrides, seed: int) -> float:
    run_dir = FOLDER / "runs" / chosen.shards / f"{label.replace(' ', '_')}_{seed}"
    if not (run_dir / "learned.json").is_file():
        _train(chosen, overrides, seed, run_dir)
    score: float = json.loads((run_dir / "learned.json").read_text())[chosen.metric]
    return score


def _train(chosen: LearningSet, overrides: Overrides, seed: int, run_dir: Path) -> None:
    shards = FOLDER / "shards" / chosen.shards
    run = {f"data.{part}_shards": str(shards / part) for part in ("train", "val")} | {"train.seed": seed}
    steps = {f"train.{key}": chosen.steps for key in ("steps", "evaluate_every_steps", "checkpoint_every_steps")}
    settings = [f"--set={text}" for text in _texts({**overrides, **run, **steps})]
    command = ["piip-scale", "train", str(_CONFIGS / chosen.recipe), "--procs", "1", "--run-dir", str(run_dir)]
    subprocess.run([*command, "--no-progress", *settings], check=True, stdout=subprocess.DEVNULL)
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    (evaluated,) = (record for record in records if record["kind"] == "evaluation")
    (run_dir / "learned.json").write_text(json.dumps(evaluated))


def _texts(overrides: Overrides) -> list[str]:
    return [f"{key}={value!r}" for key, value in overrides.items()]
