"""What putting the numbers of many ranks together costs the host of each of them."""

from __future__ import annotations

import time
from dataclasses import replace
from statistics import median

import torch

from piip_scale.engine.branch_watch import BranchWatch
from piip_scale.engine.collective import mean_over_ranks
from piip_scale.engine.interval import Interval
from piip_scale.engine.step import train_step
from piip_scale.engine.trainer import StepReport
from piip_scale.engine.zero.setup import build_engine
from piip_scale.world import World
from sections.processes import run_ranks
from sections.record import table
from sections.subject import build, detector_config, made_up_batch

_RANKS = (1, 8, 64, 512)
_INTERVALS = 50
_STEP_S, _STILL_S = 1.0, 0.1
_BYTES_A_NUMBER = 16


def section() -> str:
    """The table by number of ranks, of one that says there are so many."""
    every = detector_config().train.log_every_steps
    found = run_ranks(1, host_ms)[0]
    rows = [
        [ranks, numbers, f"{numbers * _BYTES_A_NUMBER / 1024:.1f}", f"{ms:.2f}", f"{ms / every / _STEP_S / 1e3:.4%}"]
        for ranks, (numbers, ms) in found.items()
    ]
    head = ["ranks", "numbers", "KiB of their message", "ms an interval", f"share of {every} steps of a second"]
    return (
        "Of a step that is written, each rank's own part: reading what it holds of the branches, naming its numbers, "
        "and reading the means. One rank that is told of so many others, so that the messages, and the digest of names "
        f"before them, are left out; the network of the small Mask R-CNN, medians of {_INTERVALS}. There are two "
        "messages an interval whatever the number of ranks, one of 16 bytes and one of two float64 a number.\n\n"
        f"{table(head, rows)}"
    )


def host_ms(world: World, device: torch.device) -> dict[int, tuple[int, float]]:
    """Numbers that are exchanged, and milliseconds of an interval, by number of ranks."""
    config = detector_config(zero={"stage": 3}, train={"steps": 1, "precision": "fp32"})
    engine, _ = build_engine(build(config), config, world)
    result = train_step(engine, [made_up_batch(0)], 0, 0, world)
    report = StepReport(1, replace(result, message_seconds=_STILL_S), 1e-4, _STEP_S, 0.0)
    watch = BranchWatch(engine, engine.module.parts())
    found = {}
    for ranks in _RANKS:
        interval = Interval(replace(world, num_ranks=ranks), device, ["node"] * ranks, 1.0, watch)
        taken = [_interval_ms(interval, report, device) for _ in range(_INTERVALS)]
        interval.add(report)
        found[ranks] = (len({**result.losses, **interval.own(report)}), median(taken))
    return found


def _interval_ms(interval: Interval, report: StepReport, device: torch.device) -> float:
    interval.add(report)
    begun = time.perf_counter()
    means = mean_over_ranks({**report.result.losses, **interval.own(report)}, device)
    interval.record(means, report)
    return (time.perf_counter() - begun) * 1e3
