"""What all that is measured in a step costs it: steps with it and without, in turns, in one run."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from statistics import median
from unittest import mock

import torch

from piip_scale.engine.branch_watch import BranchWatch
from piip_scale.engine.hooks import LogSteps, Silence, Sink
from piip_scale.engine.interval import Interval
from piip_scale.engine.phases import PassClock
from piip_scale.engine.step import train_step
from piip_scale.engine.trainer import StepReport
from piip_scale.engine.utilisation import Utilisation
from piip_scale.engine.zero.message_clock import MessageClock
from piip_scale.engine.zero.setup import build_engine
from piip_scale.run.gpu_time import GpuTimeFile
from piip_scale.run.run_dir import RunDirectory
from piip_scale.telemetry.telemetry import Telemetry
from piip_scale.world import World
from sections.processes import run_ranks
from sections.record import table
from sections.subject import build, detector_config, made_up_batch

# Of a block the last step is written, as by train.log_every_steps' default.
_BLOCK, _TURNS, _WARM_UP = 10, 5, 1


def section() -> str:
    """The table of ratios on one rank and on two."""
    rows = []
    for num_ranks in (1, 2):
        found = run_ranks(num_ranks, blocks)[0]
        for kind, place in (("clock", 0), ("processor time", 1)):
            pairs = [(on[place], off[place]) for on, off in found]
            ratios = sorted(on / off for on, off in pairs)
            on_ms, off_ms = (median(side) / _BLOCK * 1e3 for side in zip(*pairs, strict=True))
            shares = [f"{ratio - 1:+.1%}" for ratio in (median(ratios), ratios[0], ratios[-1])]
            rows.append([f"{num_ranks} rank(s), {kind}", f"{off_ms:.1f}", f"{on_ms - off_ms:+.2f}", *shares])
    return (
        f"Rank 0, {_TURNS} turns of {_BLOCK} steps with all telemetry and {_BLOCK} without, of which none marks or "
        "writes anything; of the steps with it the last is written: losses, interval, branches, files, TensorBoard. A "
        f"small Mask R-CNN, ZeRO-3 in float32, one image of {made_up_batch(0).images_BHWC.shape[1]} px a rank, one "
        "thread a rank: a step of a large model takes as much telemetry, but for norms of more parameters. Ratios are of "
        f"neighbouring turns: median, lowest and highest; load average at the end: {os.getloadavg()[0]:.1f}.\n\n"
        + table(["", "ms a step without", "more with", "median", "lowest", "highest"], rows)
    )


def blocks(world: World, device: torch.device) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    """Seconds by the clock and of the processor of each turn, with telemetry and without."""
    config = detector_config(
        train={"steps": 1, "precision": "fp32"}, optimizer={"clip_grad_norm": 1.0}, zero={"stage": 3}
    )
    engine, _ = build_engine(build(config), config, world)
    found, step = [], 0

    def block(hook: LogSteps | None, length: int) -> tuple[float, float]:
        nonlocal step
        torch.distributed.barrier()
        begun = time.perf_counter(), time.process_time()
        for _ in range(length):
            step_begun = time.perf_counter()
            result = train_step(engine, [made_up_batch(world.rank)], step, 0, world)
            step += 1
            if hook:
                hook.after_step(StepReport(step, result, 1e-4, time.perf_counter() - step_begun, 0.0))
        return time.perf_counter() - begun[0], time.process_time() - begun[1]

    with tempfile.TemporaryDirectory() as folder:
        hook = _hook(world, device, Path(folder), BranchWatch(engine, engine.module.parts()))
        block(None, _BLOCK * _WARM_UP)
        for turn in range(_TURNS):
            halves = {}
            # In turns also which comes first.
            for is_on in (turn % 2 == 0, turn % 2 == 1):
                with nullcontext() if is_on else _nothing_marked():
                    halves[is_on] = block(hook if is_on else None, _BLOCK)
            found.append((halves[True], halves[False]))
    return found


def _hook(world: World, device: torch.device, folder: Path, branches: BranchWatch) -> LogSteps:
    run = RunDirectory(folder)
    sink: Sink = Silence()
    gpu_time = None
    if world.is_main:
        sink = Telemetry(folder, 10**6, show_progress=False, log_every_steps=_BLOCK)
        gpu_time = GpuTimeFile(run.gpu_time, world.num_ranks)
    interval = Interval(world, device, ["here"] * world.num_ranks, 1.0, branches, gpu_time)
    utilisation = Utilisation(lambda height, width: height * width, None)
    return LogSteps(sink, run, world, device, _BLOCK, 10**6, utilisation, lambda: 0, interval)


@contextmanager
def _nothing_marked() -> Iterator[None]:
    def still(_clock: MessageClock, _device: torch.device) -> AbstractContextManager[None]:
        return nullcontext()

    with (
        mock.patch.object(MessageClock, "still", still),
        mock.patch.object(PassClock, "mark", return_value=None),
    ):
        yield
