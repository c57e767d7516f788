"""Layouts of sharding as data, and a run in each: what it computed, what it sent, and where it went on."""

from __future__ import annotations

import hashlib
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from ranks import run_ranks, tiny_config
from sections.spy import CollectiveSpy
from test_equality import STEPS, global_batches, plain, spoiled, weights_of
from tiny_task import TinyTask, make_batch

from piip_scale.checkpoint.averages import AVERAGE
from piip_scale.engine.checkpointing import Checkpointer
from piip_scale.engine.ema import build_average
from piip_scale.engine.evaluation import evaluate
from piip_scale.engine.optim import set_learning_rate
from piip_scale.engine.resuming import find_checkpoint
from piip_scale.engine.schedule import lr_factor
from piip_scale.engine.step import total_loss, train_step
from piip_scale.engine.zero.partitions import partitions
from piip_scale.engine.zero.plan import measure, shard_ranks
from piip_scale.engine.zero.replicas import check_replicas
from piip_scale.engine.zero.setup import build_engine, build_model
from piip_scale.engine.zero.traffic import bytes_between, bytes_inside, step_traffic
from piip_scale.errors import RunError
from piip_scale.world import World

RANKS, IMAGES = 4, 8
# Nothing stays gathered for reuse, as in a model far larger than a device: what the formula counts.
RELEASED = {
    "zero_optimization": {
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 0,
        "reduce_bucket_size": 6000,
    }
}
# Of messages, in bytes: norms and flags, which the formula leaves out.
SMALL = 64
SAVED_AT, SKIPPED_AT = 2, 3
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "all, 2 x 2": (2, {"stage": 3, "deepspeed": RELEASED}),
    "all, 4 x 1": (1, {"stage": 3, "deepspeed": RELEASED}),
    "node, 2 x 2": (2, {"stage": 3, "deepspeed": RELEASED, "shard_over": "node"}),
    "node, 4 x 1": (1, {"stage": 3, "deepspeed": RELEASED, "shard_over": "node"}),
    "1 rank, 2 x 2": (2, {"stage": 3, "deepspeed": RELEASED, "shard_over": 1}),
    "2 ranks, 4 x 1": (1, {"stage": 3, "deepspeed": RELEASED, "shard_over": 2}),
    "hpZ, 2 x 2": (2, {"stage": 3, "deepspeed": RELEASED, "node_partition": 2}),
    "ZeRO-2, 2 x 2": (2, {"stage": 2}),
    "ZeRO-1, 2 x 2": (2, {"stage": 1}),
}
"""By name ranks on a node, and the config's section ``zero``."""


def placed(world: World, ranks_per_node: int) -> World:
    """The same ranks on nodes of so many."""
    node, local = divmod(world.rank, ranks_per_node)
    return replace(world, ranks_per_node=ranks_per_node, local_rank=local, node_rank=node)


@dataclass(frozen=True)
class Cell:
    """A layout and what else decides its messages."""

    layout: str
    precision: str = "fp32"
    reduce_dtype: str = "fp32"
    accumulation: int = 2

    @property
    def ranks_per_node(self) -> int:
        return LAYOUTS[self.layout][0]

    @property
    def ranks_of_a_copy(self) -> int:
        """Of state: those that do not share it are replicas."""
        return shard_ranks(self.config().zero, RANKS, self.ranks_per_node)

    def config(self):
        # As test_equality.plain: layer decay, clipping, and each rank's loss a mean over equally many images.
        return tiny_config(
            data={"micro_batch_size": IMAGES // (self.accumulation * RANKS)},
            optimizer={"lr": 1e-2, "layer_decay": 0.8, "clip_grad_norm": 0.5},
            zero=LAYOUTS[self.layout][1] | {"reduce_dtype": self.reduce_dtype},
            train={
                "steps": STEPS,
                "gradient_accumulation": self.accumulation,
                "precision": self.precision,
                "background_saves": False,
                "ema_decay": 0.5,
            },
        )


EVERY = tuple(
    Cell(layout, precision, reduced)
    for layout in LAYOUTS
    for precision, reduced in (("fp32", "fp32"), ("bf16", "fp32"), ("bf16", "bf16"))
)


@dataclass
class Run:
    """What one rank says of a run.

    Attributes:
        trace: Of each call of a step the loss of all images, the gradient's norm, and whether it was applied.
        weights: As the model computes with them.
        averaged: Loss with the averages in place, of images that are the same on every rank.
        evaluated: The metric of an evaluation with them, of images that ranks share.
        slices: A digest of this rank's masters, moments and averages.
        bytes_sent: In a step, inside the node and to other nodes, as counted.
        by_formula: The same of the whole world, by the formula.
        calls: Messages that left a node, by kind, in a step.
        order: Kinds of all messages of a step.
        notices: Whether this rank is told once a weight of the last rank is another.
    """

    trace: list[tuple[float, float, bool]]
    weights: dict[str, np.ndarray]
    averaged: float
    evaluated: float
    slices: str
    bytes_sent: tuple[float, float] = (0.0, 0.0)
    by_formula: tuple[float, float] = (0.0, 0.0)
    calls: dict[str, int] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    notices: bool = False


def train(world: World, cell: Cell, *, nan_at: int | None = None, save: Path | None = None, go_on: Path | None = None):
    """Trains to the end; one call of a step is watched, and one may have a gradient that is not finite on one rank."""
    from deepspeed.utils import groups

    # DeepSpeed makes the group of hpZ once in a process, and refuses a second engine with one.
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
    world, config = placed(world, cell.ranks_per_node), cell.config()
    task = TinyTask(config, world, drop=0.0)
    # A run that goes on draws other weights, so that those of the checkpoint have to come.
    engine, plan = build_engine(build_model(task, 1 if go_on else 0), config, world)
    saver = Checkpointer(engine, save or go_on or Path(), config, world, STEPS)
    found = find_checkpoint(go_on) if go_on else None
    step = first = found.resume(engine, saver.describe(0)) if found else 0
    average = build_average(engine, config.train, saver, found)
    trace, spy = [], CollectiveSpy()
    while step < STEPS:
        if save and step == SAVED_AT:
            saver.save(step)
            saver.finish()
        set_learning_rate(engine.optimizer.param_groups, config.optimizer.lr * lr_factor(config.schedule, step, STEPS))
        batches = global_batches(step, cell.accumulation, world, (), IMAGES)
        if nan_at == len(trace) and world.rank == world.num_ranks - 1:
            batches = [*batches[:-1], spoiled(batches[-1])]
        with spy if step == STEPS - 1 else nullcontext():
            result = train_step(engine, batches, step, 0, world)
        trace.append((_mean(result.losses, world), result.grad_norm, result.applied))
        step += result.applied
        if result.applied:
            average.update()
    assert first < STEPS
    with average.in_place():
        with torch.no_grad():
            averaged = total_loss(engine(make_batch(1000, 1))).item()
        evaluation = evaluate(engine, task, torch.device("cpu"), lambda: True)
    assert evaluation is not None
    evaluated = evaluation.metrics["mean_score"]
    run = Run(trace, weights_of(engine), averaged, evaluated, _digest(engine, average))
    run.bytes_sent, run.calls = _sent(spy, world)
    run.order = [message.kind for message in spy.messages if message.num_bytes > SMALL]
    sizes = measure(engine.module, engine.module.parts())
    traffic, nodes = step_traffic(sizes, plan), world.num_ranks // world.ranks_per_node
    sums = (bytes_inside, bytes_between)
    run.by_formula = tuple(nodes * total(traffic, world.ranks_per_node) for total in sums)
    check_replicas(engine)
    run.notices = _notices_a_change(engine, world)
    return run


def _notices_a_change(engine, world) -> bool:
    if world.rank == world.num_ranks - 1:
        partitions(engine)[0].master.detach().view(-1)[0] += 1
    try:
        check_replicas(engine)
    except RunError:
        return True
    return False


def _mean(losses, world) -> float:
    total = (losses["loss_score"] + losses["loss_box"]).clone()
    torch.distributed.all_reduce(total)
    return total.item() / world.num_ranks


def _digest(engine, average) -> str:
    found = hashlib.sha256()
    for partition, averages in zip(partitions(engine), average.state()[AVERAGE], strict=True):
        moments = [state for state in partition.state.values() if state.numel() == averages.numel() > 1]
        assert len(moments) == 2
        # Without padding, which is whatever lay there.
        for part in partition.slices:
            for tensor in (partition.master, averages, *moments):
                found.update(part.of(tensor.detach().view(-1)).numpy().tobytes())
    return found.hexdigest()


def _sent(spy: CollectiveSpy, world: World) -> tuple[tuple[float, float], dict[str, int]]:
    inside = between = 0.0
    calls: Counter[str] = Counter()
    for message in (message for message in spy.messages if message.num_bytes > SMALL):
        other, sent = message.hop(world.rank)
        if other // world.ranks_per_node == world.node_rank:
            inside += sent
        else:
            between += sent
        calls[message.kind] += len({rank // world.ranks_per_node for rank in message.ranks}) > 1
    return (inside, between), dict(+calls)


def assert_replicas_are_equal(runs: Sequence[Run], cell: Cell) -> None:
    """Bit for bit, of each slice."""
    size = cell.ranks_of_a_copy
    for rank in range(RANKS):
        assert runs[rank].slices == runs[rank % size].slices
        np.testing.assert_array_equal(runs[rank].trace, runs[0].trace)
        assert runs[rank].averaged == runs[0].averaged
        assert runs[rank].evaluated == runs[0].evaluated
        for name, weight in runs[0].weights.items():
            np.testing.assert_array_equal(runs[rank].weights[name], weight)


def counted(runs: Sequence[Run]) -> list[float]:
    """All ranks' bytes of a step, inside nodes and between them."""
    return [sum(column) for column in zip(*(run.bytes_sent for run in runs), strict=True)]


def assert_sent_as_by_the_formula(runs: Sequence[Run], cell: Cell) -> None:
    # Stages 1 and 2 pad their flat groups, of which so small a model has several, for DeepSpeed's own reasons.
    rel = 1e-9 if LAYOUTS[cell.layout][1]["stage"] == 3 else 2e-3
    assert counted(runs) == pytest.approx(runs[0].by_formula, rel=rel)


def trained(
    world: World, _device, cells: Sequence[Cell], onward: Iterable[Cell], folder: Path, back: Iterable[Cell] = ()
):
    """Every cell with a step that is skipped; those that go on where the first was saved; the first where these were.

    Returns:
        The runs by cell, of the last ones by that in whose layout they began.
    """
    # DeepSpeed collects garbage 20 times an engine, before reports of memory.
    with mock.patch("gc.collect"):
        found = {cell: train(world, cell, nan_at=SKIPPED_AT, save=folder / str(i)) for i, cell in enumerate(cells)}
        gone_on = {cell: train(world, cell, go_on=folder / "0") for cell in onward}
        gone_back = {cell: train(world, cells[0], go_on=folder / str(cells.index(cell))) for cell in back}
        return found, gone_on, gone_back


def row(runs: Sequence[Run], cell: Cell, expected: dict) -> str:
    """Of the table: differences from torch alone, and bytes as counted and by the formula."""
    assert_replicas_are_equal(runs, cell)
    trace = [call for call in runs[0].trace if call[2]]
    figures = [abs(trace[0][i] / expected["trace"][0][i] - 1) for i in (0, 1)]
    apart = max(float(np.abs(runs[0].weights[name] - weight).max()) for name, weight in expected["weights"].items())
    sent = [f"{x:,.0f} / {y:,.0f}" for x, y in zip(counted(runs), runs[0].by_formula, strict=True)]
    reduced = "" if cell.precision == "fp32" else f", sums in {cell.reduce_dtype}"
    cells = [f"{cell.layout}", f"{cell.precision}{reduced}", *(f"{x:.1e}" for x in (*figures, apart)), *sent]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Prints the table of every layout in every precision."""
    head = ["layout", "precision", "first loss", "first norm", "weights", "bytes inside", "bytes between"]
    print(f"| {' | '.join(head)} |\n| --- | --- |{' ---: |' * 5}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        ranks = run_ranks(RANKS, trained, EVERY, (), Path(folder), timeout_s=1500)
    for cell in EVERY:
        print(row([found[cell] for found, *_ in ranks], cell, plain(2, images=IMAGES)))


if __name__ == "__main__":
    main()
