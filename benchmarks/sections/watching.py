"""The same training's steps, watched and not, in turns: what an ordinary step and one that is written cost."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from statistics import fmean, median, quantiles
from typing import cast
from unittest.mock import patch

import torch
import torch.distributed as dist

from piip_scale.config.detection import DetectionRun
from piip_scale.config.loading import load_config
from piip_scale.data.batch import Batch
from piip_scale.engine import step as step_module
from piip_scale.engine.batch_stream import BatchStream
from piip_scale.engine.branch_watch import BranchWatch
from piip_scale.engine.hooks import LogSteps, Silence, Sink
from piip_scale.engine.interval import Interval
from piip_scale.engine.stop import StopFlag
from piip_scale.engine.trainer import StepReport, Trainer
from piip_scale.engine.utilisation import Utilisation
from piip_scale.engine.zero.deepspeed_api import Engine
from piip_scale.engine.zero.message_clock import MESSAGES
from piip_scale.engine.zero.setup import build_engine
from piip_scale.run.gpu_time import GpuTimeFile
from piip_scale.run.heartbeat import Heartbeat
from piip_scale.run.progress_notes import ProgressNotes
from piip_scale.run.run_dir import RunDirectory
from piip_scale.telemetry.telemetry import Telemetry
from piip_scale.world import World
from sections.processes import run_ranks
from sections.record import table
from sections.subject import SIZE_PX, build, detector_config, made_up_batch

_DEMO = Path(__file__).parents[2] / "configs" / "demo" / "digits.py"
_RANKS = (1, 2)
_PAIRS = {"small": 16, "demo": 6}
"""Pairs of intervals that count, by what is trained."""
_WARM_UP = 2
"""Pairs before those."""
_NAMES = {
    "small": f"a small Mask R-CNN, one image of {SIZE_PX} px a rank",
    "demo": "the demo's, eight a rank",
}


@dataclass(frozen=True)
class Spent:
    """Milliseconds of one step.

    Attributes:
        whole: From the end of the step before to the end of this one, what is written of it included.
        processor: The same of this process on its cores, all threads.
        watching: What is done for the watching after the step.
    """

    whole: float
    processor: float
    watching: float


@dataclass(frozen=True)
class Found:
    """What the main rank of a training saw.

    Attributes:
        watched: Intervals of steps, the last one of each written.
        alone: As many, in turns with those.
    """

    watched: list[list[Spent]]
    alone: list[list[Spent]]


def section() -> str:
    """The table of both trainings on one and on two ranks."""
    found = {
        (name, ranks): run_ranks(ranks, watched_and_alone, name, pairs)[0]
        for name, pairs in _PAIRS.items()
        for ranks in _RANKS
    }
    columns = [_column(each) for each in found.values()]
    rows = [[key, *(column[key] for column in columns)] for key in columns[0]]
    head = ["", *(f"{name}, {ranks} rank{'s' * (ranks > 1)}" for name, ranks in found)]
    every = detector_config().train.log_every_steps
    return (
        f"`small` is {_NAMES['small']}, `demo` {_NAMES['demo']}: ZeRO-3 in float32, a thread a rank, images made up. "
        f"Every {every} steps of one training are watched as by default (every {every}th is written: TensorBoard, "
        f"`metrics.jsonl`, status and GPU time) and the next {every} are not watched at all, marks inside of the step "
        f"included, in turns: {', '.join(f'{pairs} pairs of {name}' for name, pairs in _PAIRS.items())}. Times are "
        "rank 0's, medians with the first and third quartile; ranks meet before what is watched is timed. A step that "
        "is watched less one that is not has all noise of the machine in it; load average at the end: "
        f"{os.getloadavg()[0]:.1f}.\n\n{table(head, rows)}"
    )


def _column(found: Found) -> dict[str, str]:
    ordinary = [step.watching for interval in found.watched for step in interval[:-1]]
    written = [interval[-1].watching for interval in found.watched]
    every = len(found.watched[0])
    interval_ms = median(ordinary) * (every - 1) + median(written)
    step_ms = median(step.whole for interval in found.alone for step in interval)
    return {
        "a step that is not watched, ms": f"{step_ms:.0f}",
        "watching an ordinary step, ms": _quartiles(ordinary, 3),
        "watching a step that is written, ms": _quartiles(written, 2),
        "both over an interval, share of its steps": f"{interval_ms / (every * step_ms):.2%}",
        "a step of a watched interval less one of its neighbour, ms": _quartiles(_differences(found, "whole"), 2),
        "the same in processor time, ms": _quartiles(_differences(found, "processor"), 2),
    }


def _quartiles(values: Sequence[float], digits: int) -> str:
    low, _, high = quantiles(values, n=4)
    return f"{median(values):.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def _differences(found: Found, kind: str) -> list[float]:
    def mean_ms(interval: list[Spent]) -> float:
        return fmean(getattr(step, kind) for step in interval)

    return [mean_ms(watched) - mean_ms(alone) for watched, alone in zip(found.watched, found.alone, strict=True)]


def watched_and_alone(world: World, device: torch.device, name: str, pairs: int) -> Found:
    """Trains in turns.

    Args:
        world: The ranks.
        device: Theirs.
        name: What is trained: a key of ``_PAIRS``.
        pairs: Pairs of intervals that count.
    """
    config, num_images = _config_of(name)
    every = config.train.log_every_steps
    engine, _ = build_engine(build(config), config, world)
    stream = cast(BatchStream, _Stream([made_up_batch(world.rank, num_images)], 2 * every * (pairs + _WARM_UP)))
    with tempfile.TemporaryDirectory() as folder:
        run = RunDirectory(folder)
        sink = Telemetry(run.path, stream.total_steps, log_every_steps=every, stream=StringIO())
        hook = log_steps(engine, config, world, device, run, sink, stream.total_steps)
        turns = _Turns(hook, every)
        Trainer(engine, stream, config, world, device, StopFlag(), [turns], Heartbeat()).run()
        sink.close("done")
    return turns.found


def _config_of(name: str) -> tuple[DetectionRun, int]:
    if name == "demo":
        config = load_config(_DEMO, ["data.train_shards='-'", "data.val_shards='-'"])
        return cast(DetectionRun, config), config.data.micro_batch_size
    return detector_config(zero={"stage": 3}, train={"steps": 1000, "precision": "fp32"}), 1


def log_steps(
    engine: Engine,
    config: DetectionRun,
    world: World,
    device: torch.device,
    run: RunDirectory,
    sink: Sink,
    total_steps: int,
) -> LogSteps:
    """What watches a training by default, but that it knows of no work by size of image."""
    watch = BranchWatch(engine, engine.module.parts())
    gpu_time = GpuTimeFile(run.gpu_time, world.num_ranks) if world.is_main else None
    nodes = ["node"] * world.num_ranks
    return LogSteps(
        sink if world.is_main else Silence(),
        ProgressNotes(run, gpu_time),
        world,
        device,
        config.train.log_every_steps,
        total_steps,
        Utilisation(lambda height, width: height * width, None),
        lambda: 0,
        Interval(world, device, nodes, config.optimizer.clip_grad_norm, watch, gpu_time),
    )


class _Stream:
    """The same micro-batches in every step."""

    wait_seconds = 0.0

    def __init__(self, batches: list[Batch], total_steps: int) -> None:
        self._batches, self.total_steps = batches, total_steps

    def step(self, _step: int) -> Iterator[Batch]:
        yield from self._batches


class _NoClock:
    """Marks nothing in a step that is not watched."""

    def mark(self, _device: torch.device) -> None:
        """Nothing."""

    def seconds(self) -> tuple[float, float]:
        """Nothing."""
        return 0.0, 0.0


@contextmanager
def _unwatched() -> Iterator[None]:
    with (
        patch.object(step_module, "PassClock", _NoClock),
        patch.object(MESSAGES, "still", lambda _device: nullcontext()),
        patch.object(MESSAGES, "take", lambda: None),
    ):
        yield


class _Turns:
    """Has a hook watch the steps of every other interval, and keeps the time of all."""

    doing = "logging"

    def __init__(self, hook: LogSteps, every: int) -> None:
        self._hook, self._every = hook, every
        self._intervals: list[list[Spent]] = []
        self._off = ExitStack()
        self._last = time.perf_counter(), time.process_time()

    @property
    def found(self) -> Found:
        """What counts of all intervals."""
        intervals = self._intervals[2 * _WARM_UP :]
        return Found(intervals[0::2], intervals[1::2])

    def after_step(self, report: StepReport) -> None:
        """Calls the hook where the interval is watched."""
        place = (report.step - 1) % self._every
        if not place:
            self._intervals.append([])
        is_watched = len(self._intervals) % 2 == 1
        dist.barrier()
        begun = time.perf_counter()
        if is_watched:
            self._hook.after_step(report)
        now = time.perf_counter(), time.process_time()
        whole, processor = ((end - start) * 1e3 for start, end in zip(self._last, now, strict=True))
        self._intervals[-1].append(Spent(whole, processor, (now[0] - begun) * 1e3))
        if place == self._every - 1:
            self._turn(is_watched)
        self._last = time.perf_counter(), time.process_time()

    def _turn(self, was_watched: bool) -> None:
        self._off.close()
        if was_watched:
            self._off.enter_context(_unwatched())

    def at_stop(self, step: int) -> None:
        """Nothing."""

    def at_end(self, step: int) -> None:
        """Nothing."""
        self._off.close()
