"""What a step that is written asks of disks and of other ranks, and who waits for it: counts."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from piip_scale.engine.collective import count_collectives
from piip_scale.engine.hooks import LogSteps
from piip_scale.engine.step import train_step
from piip_scale.engine.trainer import StepReport
from piip_scale.engine.zero.setup import build_engine
from piip_scale.run.run_dir import RunDirectory
from piip_scale.telemetry.telemetry import Telemetry
from piip_scale.world import World
from sections.file_operations import count_operations
from sections.processes import run_ranks
from sections.record import table
from sections.subject import build, detector_config, made_up_batch
from sections.watching import log_steps

_RANKS = (1, 2)
_OTHERS = "other operations on files"
# Until threads beside the training have done their part.
_SETTLED_S = 0.5


def section() -> str:
    """The table of the steps of an interval, by number of ranks."""
    found = {ranks: run_ranks(ranks, counts)[0] for ranks in _RANKS}
    kinds = list(next(iter(found.values()))[0])
    head, rows = [""], [[kind] for kind in kinds]
    for ranks, steps in found.items():
        head += [f"ordinary steps, {ranks} rank{'s' * (ranks > 1)}", f"the one that is written, {ranks}"]
        for row, kind in zip(rows, kinds, strict=True):
            row += [f"{step[kind]:,}" for step in steps]
    return (
        "What rank 0 of the small Mask R-CNN does in an interval of ten steps beside training, all ordinary steps "
        "together: messages among ranks, operations in the run's folder, waits until something is on the disk, and "
        "bytes that its files grow by. Other ranks take part in the messages alone. That a GPU is waited for in no "
        f"ordinary step is held by `tests/engine/test_watching_waits.py`.\n\n{table(head, rows)}"
    )


def counts(world: World, device: torch.device) -> tuple[dict[str, int], dict[str, int]]:
    """Of an interval's ordinary steps together, and of the one that is written."""
    config = detector_config(zero={"stage": 3}, train={"steps": 1000, "precision": "fp32"})
    every = config.train.log_every_steps
    engine, _ = build_engine(build(config), config, world)
    result = train_step(engine, [made_up_batch(world.rank)], 0, 0, world)
    reports = [StepReport(step, result, 1e-4, 1.0, 0.0) for step in range(1, 2 * every + 1)]
    with tempfile.TemporaryDirectory() as folder:
        run = RunDirectory(folder)
        sink = Telemetry(run.path, len(reports), log_every_steps=every, stream=StringIO())
        hook = log_steps(engine, config, world, device, run, sink, len(reports) + 1)
        _counted(hook, run.path, reports[:every])
        found = _counted(hook, run.path, reports[every:-1]), _counted(hook, run.path, reports[-1:])
        sink.close("done")
    return found


def _counted(hook: LogSteps, folder: Path, reports: list[StepReport]) -> dict[str, int]:
    messages, size = count_collectives(), _size(folder)
    with count_operations(folder) as files, _counting_waits() as waits:
        for report in reports:
            hook.after_step(report)
        messages = count_collectives() - messages
        time.sleep(_SETTLED_S)
    named = {"files opened": files["open"], "files renamed": files["rename"]}
    return {
        "messages among ranks": messages,
        **named,
        _OTHERS: files.total() - sum(named.values()),
        "waits for a disk by the training": waits["MainThread"],
        "by a thread beside it": waits.total() - waits["MainThread"],
        "bytes added": _size(folder) - size,
    }


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@contextmanager
def _counting_waits() -> Iterator[Counter[str]]:
    waits: Counter[str] = Counter()
    fsync = os.fsync

    def counted(file: Any) -> None:
        waits[threading.current_thread().name] += 1
        fsync(file)

    with patch.object(os, "fsync", counted):
        yield waits
