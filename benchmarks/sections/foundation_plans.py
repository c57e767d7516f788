"""What the configs around foundation models need of a GPU, as ``piip-scale plan`` says it."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path

from piip_scale.config.loading import load_config
from piip_scale.data.reading.opened import OpenedSets
from piip_scale.engine.batching import planned_batch
from piip_scale.engine.planning.planner import Planner
from piip_scale.tasks.counting import likely_classes
from piip_scale.tasks.outline import outline_run
from sections.record import table

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "foundation").glob("*.py"))
SETTINGS = ((1, 24), (1, 40), (1, 80), (8, 80))
"""GPUs, and GiB of each."""
_GIB = 2**30
_HOW = (
    "What a GPU needs, in GiB, by `piip-scale plan CONFIG --gpus-per-node N --gpu-memory-gib M`, at the largest images "
    "of training;\nbrackets: does not fit."
)
_BEYOND = (
    'Where more is left than needed, `checkpoint_blocks="auto"` lets blocks keep their activations, so a larger GPU '
    "may\n"
    "plan more. `--set 'model.branches.0.frozen_dtype=\"int8\"'` about halves the memory of a frozen giant's weights\n"
    "([frozen.md](frozen.md))."
)


def section() -> str:
    """A row a config; a few minutes of a core."""
    header = ["config", *(f"{gpus} x {gib}" for gpus, gib in SETTINGS)]
    return f"{_HOW}\n\n{table(header, rows(CONFIGS))}\n\n{_BEYOND}"


def rows(configs: Iterable[Path]) -> list[list[str]]:
    """The table's rows of some configs."""
    return [[f"`{path.stem}`", *(_needed(path, gpus, gib) for gpus, gib in SETTINGS)] for path in configs]


def _needed(path: Path, num_gpus: int, gpu_gib: int) -> str:
    config, _ = planned_batch(load_config(path), num_gpus)
    outline = partial(outline_run, num_classes=likely_classes(config, OpenedSets())[1], size_px=None)
    planner = Planner(outline, gpu_gib * _GIB, num_gpus)
    plan = planner.plan(planner.settled(config, num_gpus), num_gpus)
    needed = f"{plan.total / _GIB:.1f}"
    return needed if plan.fits else f"({needed})"
