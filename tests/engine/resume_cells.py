"""Every way a run can be cut off and go on, as data: the whole product of them, and a few that hold every pair."""

from __future__ import annotations

import itertools
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from pyramid_task import PyramidTask, network, pyramid_config
from ranks import FORCED_RELEASE, run_ranks
from test_equality import weights_of
from tiny_task import make_batch

from piip_scale.engine.checkpointing import Checkpointer
from piip_scale.engine.ema import build_average
from piip_scale.engine.resuming import find_checkpoint
from piip_scale.engine.step import train_step
from piip_scale.engine.zero.raw_keys import ALLOWED, nested
from piip_scale.engine.zero.setup import build_engine, build_model, give_blanks, give_weights

SAVED_AT, STEPS, IMAGES = 2, 3, 2
STAGES = (1, 2, 3)
OPTIONS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "plain": (STAGES, {}),
    "optimizer on the host": (STAGES, {"offload_optimizer": "cpu"}),
    "reduced in bf16": (STAGES, {"reduce_dtype": "bf16"}),
    "all on the host": ((3,), {"offload_optimizer": "cpu", "offload_parameters": "cpu"}),
    "released": ((3,), {"deepspeed": FORCED_RELEASE}),
    "second copy": ((3,), {"node_partition": 2}),
    "second copy, released": ((3,), {"node_partition": 2, "deepspeed": FORCED_RELEASE}),
    "replicas": ((3,), {"shard_over": 1}),
}
ALONE = {f"key {key.path}": key for key in ALLOWED if not key.on_disk}
TOGETHER = {f"all keys of stage {stage}": stage for stage in STAGES}
"""Options beside those of the product: each raw key that may be set, and those of a stage that change no number."""
FROZEN = {"none": {}, "blocks": {"frozen_blocks": 1}, "branch": {"frozen_blocks": "all"}}
"""Of the large branch."""
# One stage: what DeepSpeed does to each parameter is most of the time, and a second one has no other kinds of them.
SMALLEST = {"small": {"depth": 1}, "interaction": {"num_stages": 1, "num_heads": 2, "gamma_init": 0.1}}
MOVES = {"2 -> 2": (2, 2), "2 -> 1": (2, 1), "1 -> 2": (1, 2)}
# Of the first loss and its gradient's norm, relative, and of weights, after another number of ranks: rounding.
TOLERANCES = {"fp32": (1e-5, 5e-5), "bf16": (2e-2, 2e-2)}


@dataclass(frozen=True)
class Layout:
    """How a run keeps its numbers."""

    stage: int
    option: str
    frozen: str
    averaged: bool
    precision: str


@dataclass(frozen=True)
class Cell(Layout):
    """A run that was cut off and went on."""

    move: str

    @property
    def layout(self) -> Layout:
        return Layout(*astuple(self)[:-1])


def _zero_of(option: str) -> dict[str, Any]:
    if option in ALONE:
        key = ALONE[option]
        return {"deepspeed": key.example} | ({key.needs: "cpu"} if key.needs else {})
    if option in TOGETHER:
        keys = [key for key in ALLOWED if TOGETHER[option] in key.stages and key.keeps_numbers]
        return {"deepspeed": nested({key.path: key.sample for key in keys if not (key.needs or key.on_disk)})}
    return dict(OPTIONS[option][1])


def every_cell() -> list[Cell]:
    stages = [(stage, option) for option, (stages, _) in OPTIONS.items() for stage in stages]
    rest = itertools.product(FROZEN, (False, True), TOLERANCES, MOVES)
    cells = [Cell(*layout, *others) for layout, others in itertools.product(stages, rest)]
    return [cell for cell in cells if cell.precision == "bf16" or "reduce_dtype" not in _zero_of(cell.option)]


def covering(cells: Sequence[Cell]) -> list[Cell]:
    """Few of the cells in which every pair of values occurs that occurs in any: the one with most new pairs, again."""
    missing = set().union(*(_pairs(cell) for cell in cells))
    chosen = []
    while missing:
        best = max(cells, key=lambda cell: len(_pairs(cell) & missing))
        chosen.append(best)
        missing -= _pairs(best)
    return chosen


def _pairs(cell: Cell) -> set[frozenset]:
    values = [(field.name, getattr(cell, field.name)) for field in fields(cell)]
    return {frozenset(pair) for pair in itertools.combinations(values, 2)}


@dataclass
class Trained:
    """What a run was after its last step.

    Attributes:
        figures: Loss and gradient norm of that step, and the loss with the averages in place where there are any.
        weights: As the model computes with them.
    """

    figures: list[float]
    weights: dict[str, np.ndarray]


def config_of(layout: Layout, num_ranks: int):
    zero = _zero_of(layout.option)
    if num_ranks == 1:
        zero.pop("node_partition", None)
    return pyramid_config(
        network(large={"depth": 2} | FROZEN[layout.frozen], **SMALLEST),
        data={"micro_batch_size": 1},
        optimizer={"lr": 1e-3, "layer_decay": 0.8},
        zero={"stage": layout.stage} | zero,
        train={
            "precision": layout.precision,
            "ema_decay": 0.5 if layout.averaged else None,
            "gradient_accumulation": IMAGES // num_ranks,
            "background_saves": False,
        },
    )


def folder_of(root: Path, layout: Layout, num_ranks: int) -> Path:
    return root / "_".join(map(str, astuple(layout))).replace(" ", "") / str(num_ranks)


def train(world, device, root: Path, layout: Layout, source: int | None = None) -> Trained:
    """From the start, with a checkpoint after two steps; or on from that of as many ranks as ``source``, to the end."""
    from deepspeed.utils import groups

    config = config_of(layout, world.num_ranks)
    task = PyramidTask(config, world)
    folder = folder_of(root, layout, source or world.num_ranks)
    found = find_checkpoint(folder) if source else None
    # DeepSpeed makes the group of hpZ once in a process, and refuses a second engine with one.
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
    give = give_blanks if found else give_weights
    engine, _ = build_engine(build_model(task, 0), config, world, give=give)
    saver = Checkpointer(engine, folder, config, world, STEPS)
    first = found.resume(engine, saver.describe(0)) if found else 0
    average = build_average(engine, config.train, saver, found)
    for step in range(first, STEPS):
        if step == SAVED_AT and not source:
            saver.save(step)
            saver.finish()
        micros = range(world.rank, IMAGES, world.num_ranks)
        result = train_step(engine, [make_batch(step * IMAGES + i, 1) for i in micros], step, 0, world)
        if average:
            average.update()
    figures = [_mean(result.losses["loss"], world), result.grad_norm]
    if average:
        with average.in_place():
            figures.append(_loss(engine, world))
    return Trained(figures, weights_of(engine))


def _loss(engine, world) -> float:
    with torch.no_grad():
        return _mean(engine(make_batch(1000, 1))["loss"], world)


def _mean(value, world) -> float:
    value = value.detach().clone()
    torch.distributed.all_reduce(value)
    return value.item() / world.num_ranks


def trained(world, device, root: Path, jobs: Iterable[tuple[Layout, int | None]]) -> dict:
    """Every job; a source is a number of ranks."""
    found = {}
    # DeepSpeed collects garbage 20 times an engine, before reports of memory: a third of all the time here.
    with mock.patch("gc.collect"):
        for layout, source in jobs:
            one = train(world, device, root, layout, source)
            found[layout, source] = one if world.is_main else None
    return found


def run_cells(root: Path, cells: Sequence[Cell]) -> dict[Cell, tuple[Trained, Trained]]:
    """What each cell's run was after going on, and what it was without a break; three launches for all cells."""
    layouts = {num: {cell.layout: None for cell in cells if MOVES[cell.move][0] == num} for num in (1, 2)}
    onward = {num: [(c.layout, MOVES[c.move][0]) for c in cells if MOVES[c.move][1] == num] for num in (1, 2)}
    from_two = [job for job in onward[2] if job[1] == 2]
    from_one = [job for job in onward[2] if job[1] == 1]
    whole, gone_on = {}, {}
    for num, jobs in ((2, from_two), (1, onward[1]), (2, from_one)):
        begun = [(layout, None) for layout in layouts.pop(num, ())]
        found = run_ranks(num, trained, root, [*begun, *jobs], timeout_s=1500)[0]
        whole |= {(layout, num): found[layout, None] for layout, _ in begun}
        gone_on |= {(layout, source, num): found[layout, source] for layout, source in jobs}
    moves = {cell: MOVES[cell.move] for cell in cells}
    return {cell: (gone_on[cell.layout, old, new], whole[cell.layout, old]) for cell, (old, new) in moves.items()}


def difference(found: Trained, expected: Trained) -> tuple[float, float]:
    """Largest relative difference of the figures, and largest of a weight."""
    figures = max(abs(a / b - 1) for a, b in zip(found.figures, expected.figures, strict=True))
    weights = max(float(np.abs(found.weights[name] - value).max()) for name, value in expected.weights.items())
    return figures, weights


def is_equal(cell: Cell, apart: tuple[float, float]) -> bool:
    """Bit for bit on the same ranks, up to rounding on others."""
    limits = (0.0, 0.0) if cell.move == "2 -> 2" else TOLERANCES[cell.precision]
    return all(value <= limit for value, limit in zip(apart, limits, strict=True))


def rows_of(cells: Sequence[Cell]) -> dict[tuple[int, str], list[Cell]]:
    """The cells of each stage and option."""
    rows: dict[tuple[int, str], list[Cell]] = {}
    for cell in cells:
        rows.setdefault((cell.stage, cell.option), []).append(cell)
    return rows


def differences(cells: Sequence[Cell]) -> dict[Cell, tuple[float, float]]:
    with tempfile.TemporaryDirectory() as folder:
        return {cell: difference(*pair) for cell, pair in run_cells(Path(folder), cells).items()}


def _row(apart: dict[Cell, tuple[float, float]]) -> str:
    """A column for each move: whether all are equal, or the largest differences, those of fp32 before bf16's."""
    columns = []
    for move in MOVES:
        found = {kind: [v for c, v in apart.items() if (c.move, c.precision) == (move, kind)] for kind in TOLERANCES}
        worst = {kind: _worst(values) for kind, values in found.items() if values}
        columns.append(" / ".join(dict.fromkeys(worst.values())))
    return " | ".join([str(len(apart)), *columns])


def _worst(values: Sequence[tuple[float, float]]) -> str:
    figures, weights = (max(column) for column in zip(*values, strict=True))
    return "equal" if figures == weights == 0 else f"{figures:.0e}, {weights:.0e}"


def main() -> None:
    """Prints a row as soon as it is known, of the few cells; with ``--every`` of the product, which takes an hour."""
    chosen = every_cell() if "--every" in sys.argv else covering(every_cell())
    print("| stage, option | cells | " + " | ".join(MOVES) + " |\n| --- | ---: |" + " --- |" * len(MOVES), flush=True)
    unequal = []
    for (stage, option), cells in rows_of(chosen).items():
        apart = differences(cells)
        unequal += [f"{cell}: {values}" for cell, values in apart.items() if not is_equal(cell, values)]
        print(f"| {stage}, {option} | {_row(apart)} |", flush=True)
    print(f"{len(chosen)} cells, {len(unequal)} not equal", *unequal, sep="\n")


if __name__ == "__main__":
    main()
