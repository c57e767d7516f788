"""How long a first save may take, before one was measured: its size, and how fast the disk takes a part of it."""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from piip_scale.engine.zero.deepspeed_api import Engine, real_shape
from piip_scale.engine.zero.replicas import num_savers
from piip_scale.logging import get_logger

# A trained weight and its two moments, in float32, beside the weight that is computed with; that alone where frozen.
_TRAINED_BYTES, _AVERAGE_BYTES = 12, 4
# Large enough for a rate, and small beside what a rank of a large model saves.
_PROBE_BYTES, _BLOCK_BYTES = 64 << 20, 1 << 20


@dataclass(frozen=True)
class FirstSave:
    """A save to come.

    Attributes:
        num_bytes: Of all its files.
        seconds: From its begin until all ranks' files are on the disk; 0 where the disk refused to be tried.
    """

    num_bytes: int
    seconds: float


def foresee_first_save(engine: Engine, folder: Path, stage: int, *, averaged: bool) -> FirstSave:
    """Has every rank write a part of its share at the same time, as a save does. Collective.

    Args:
        engine: The engine, whole.
        folder: Of the checkpoints.
        stage: Of ZeRO; in stage 0 one rank writes all.
        averaged: Averages of the weights are saved too.
    """
    num_bytes = _checkpoint_bytes(engine.module, stage, averaged=averaged)
    share = num_bytes / (num_savers(engine) if stage else 1)
    probe = int(min(share, _PROBE_BYTES))
    try:
        seconds = _write_seconds(folder, probe)
    except OSError as error:
        get_logger(__name__).warning("piip-scale: warning: cannot try the disk of %s: %s", folder, error)
        seconds = 0.0
    slowest = torch.tensor([seconds * share / max(probe, 1)], device=engine.device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return FirstSave(num_bytes, slowest.item())


def _checkpoint_bytes(model: torch.nn.Module, stage: int, *, averaged: bool) -> int:
    total = 0
    for parameter in model.parameters():
        # Stage 3 saves no trained weight twice.
        own = parameter.element_size() if stage < 3 or not parameter.requires_grad else 0
        trained = (_TRAINED_BYTES + _AVERAGE_BYTES * averaged) * parameter.requires_grad
        total += real_shape(parameter).numel() * (own + trained)
    return total


def _write_seconds(folder: Path, num_bytes: int) -> float:
    folder.mkdir(parents=True, exist_ok=True)
    # Not zeros, which some disks only count.
    block = os.urandom(min(num_bytes, _BLOCK_BYTES))
    started = time.perf_counter()
    # Without a name, so that a kill leaves nothing behind.
    with tempfile.TemporaryFile(dir=folder) as file:
        for _ in range(0, num_bytes, _BLOCK_BYTES):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return time.perf_counter() - started
