"""How long training stands still for a checkpoint, and what writing it meanwhile costs the steps."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from piip_scale.checkpoint.store import CheckpointStore
from piip_scale.engine.checkpointing import ZERO_FOLDER, Checkpointer
from piip_scale.engine.step import train_step
from piip_scale.engine.zero.setup import build_engine
from piip_scale.telemetry.memory import GIB
from piip_scale.world import World
from sections.processes import run_ranks
from sections.record import table
from sections.subject import build, detector_config, made_up_batch

_RANKS = 2
_SAVES = 3
# Width and depth of the large branch.
_SIZES = ((64, 2), (1024, 8))


def section() -> str:
    """Saves in the background beside saves that training waits for, of a tiny and of a large model."""
    rows, loads = [], []
    for large_dim, depth in _SIZES:
        with tempfile.TemporaryDirectory() as folder:
            found = run_ranks(_RANKS, rank_times, large_dim, depth, folder)[0]
        size = f"{found['parameters'] / 1e6:.1f} M, {found['gib']:.2f} GiB"
        loads.append(f"{size}: {found['load']:.2f} s")
        for way, seconds in found["ways"].items():
            rows.append([f"{size}, {way}", *_cells(seconds, found["alone"])])
    head = ["model, checkpoint", "stall: first, s", "later, s", "write, s", "step alone, s", "step while writing, s"]
    return (
        f"A Mask R-CNN in bf16 under ZeRO-3 on {_RANKS} ranks, saved {_SAVES} times: the first background save also "
        "allocates the host memory that later ones reuse. Later saves and steps are medians. On a machine without a "
        "GPU, the writing threads and the steps share the cores, of which torch uses one a rank; all of the disk's "
        f"cache and other processes are in the figures (load average {os.getloadavg()[0]:.1f} at the end).\n\n"
        f"{table(head, rows)}\n\nLoading (DeepSpeed's files into an engine that is there): {'; '.join(loads)}."
    )


def _cells(seconds: dict[str, list[float]], alone: list[float]) -> list[str]:
    first, *later = seconds["stall"]
    busy = f"{statistics.median(seconds['busy']):.2f}" if seconds["busy"] else "-"
    medians = (statistics.median(values) for values in (later, seconds["write"], alone))
    return [f"{first:.2f}", *(f"{value:.2f}" for value in medians), busy]


def rank_times(world: World, _device: torch.device, large_dim: int, depth: int, folder: str) -> dict[str, Any]:
    """Seconds of saves in both ways, and of steps without and during one."""
    run = Bench(world, large_dim, depth)
    run.step()
    found: dict[str, Any] = {"alone": [run.step() for _ in range(4)], "ways": {}}
    for way, background in (("training waits", False), ("in the background", True)):
        saves, found["gib"] = run.save(Path(folder) / way, background)
        found["ways"][way] = saves
    newest = CheckpointStore(Path(folder) / way, keep=1).latest()
    started = time.perf_counter()
    run.engine.load_checkpoint(str(newest), tag=ZERO_FOLDER)
    return found | {"load": time.perf_counter() - started, "parameters": run.num_parameters}


class Bench:
    """A detector's engine, and its steps and saves by the clock."""

    def __init__(self, world: World, large_dim: int, depth: int) -> None:
        train = {"steps": 1000, "precision": "bf16", "keep_checkpoints": 1}
        self._config = detector_config(large_dim=large_dim, depth=depth, zero={"stage": 3}, train=train)
        self.engine, *_ = build_engine(build(self._config), self._config, world)
        self._world, self._steps = world, 0
        self.num_parameters = sum(getattr(p, "ds_numel", p.numel()) for p in self.engine.module.parameters())

    def step(self) -> float:
        """Trains one step; its seconds."""
        started = time.perf_counter()
        train_step(self.engine, [made_up_batch(self._world.rank)], self._steps, 0, self._world)
        self._steps += 1
        return time.perf_counter() - started

    def save(self, folder: Path, background: bool) -> tuple[dict[str, list[float]], float]:
        """Saves some times, training meanwhile; the seconds, and the checkpoint's GiB."""
        train = self._config.train.model_copy(update={"background_saves": background})
        config = self._config.model_copy(update={"train": train})
        checkpointer = Checkpointer(self.engine, folder, config, self._world, steps_per_epoch=1000)
        seconds: dict[str, list[float]] = {"busy": [], "stall": [], "write": []}
        for _ in range(_SAVES):
            checkpointer.save(self._steps)
            while (record := checkpointer.poll()) is None:
                seconds["busy"].append(self.step())
            seconds["stall"].append(record.stall_seconds)
            seconds["write"].append(record.write_seconds)
            gib = record.num_bytes / GIB
            self.step()
        return seconds, gib
