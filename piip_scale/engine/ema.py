"""A running average of the weights: every rank averages its own part of the masters and asks no other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from piip_scale.agreement import on_main
from piip_scale.checkpoint.averages import AVERAGE, UPDATES
from piip_scale.checkpoint.zero_reader import ZeroCheckpoint
from piip_scale.config.run import TrainConfig
from piip_scale.engine.checkpointing import Checkpointer
from piip_scale.engine.resuming import Checkpoint
from piip_scale.engine.zero.deepspeed_api import Engine
from piip_scale.engine.zero.partitions import partitions, publish
from piip_scale.engine.zero.restoring import copy_slices
from piip_scale.logging import get_logger

# What exchanging weights and averages needs beside them.
_EXCHANGED_ELEMENTS = 4_000_000


def build_average(
    engine: Engine, train: TrainConfig, checkpointer: Checkpointer, found: Checkpoint | None
) -> WeightAverage | None:
    """The average that a run asks for, ``None`` for none; checkpoints hold it from now on. Not collective.

    Args:
        engine: The engine, resumed already.
        train: Asks for it.
        checkpointer: Saves it.
        found: The checkpoint it goes on from, if any.

    Raises:
        CheckpointError: The checkpoint's files are damaged.
    """
    if train.ema_decay is None:
        return None
    average = WeightAverage(engine, train.ema_decay, warmup=train.ema_warmup)
    checkpointer.add_part(AVERAGE, average.state)
    if found:
        average.restore(found.path)
    return average


class WeightAverage:
    """Exponential moving average of an engine's trained weights, float32; starts from the weights as they are.

    Buffers and parameters that are not trained are not averaged. Memory: 4 bytes a trained parameter, sharded and
    placed as the master weights are.

    Source: ``torch.optim.swa_utils.get_ema_multi_avg_fn``; warm-up as in timm's ``ModelEmaV3``.

    Args:
        engine: The engine.
        decay: Share of the average that stays at each update.
        warmup: The decay of update n, counted from 0, is at most ``1 - (1 + n) ** (-2 / 3)``.
    """

    def __init__(self, engine: Engine, decay: float, *, warmup: bool = False) -> None:
        self._engine, self._decay, self._warmup = engine, decay, warmup
        self._partitions = partitions(engine)
        self._masters = [partition.master.detach() for partition in self._partitions]
        self._averages = [master.clone() for master in self._masters]
        self._updates = 0

    def update(self) -> None:
        """Follows the weights, after a step that moved them. Not collective."""
        torch._foreach_lerp_(self._averages, self._masters, 1.0 - self._decay_now())
        self._updates += 1

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Has the model compute with the averages, and bit for bit with its weights again afterwards. Collective.

        An error inside leaves them where they are: other ranks may wait elsewhere by then, and the run is over.
        """
        self._exchange()
        yield
        self._exchange()

    def state(self) -> dict[str, Any]:
        """What this rank's checkpoint holds of it, live."""
        return {AVERAGE: self._averages, UPDATES: self._updates}

    def restore(self, checkpoint: Path) -> None:
        """Takes over the averages of a checkpoint, whichever ranks and ZeRO stage wrote it. Collective.

        Where it has none, the average starts from the weights as they are, and a warning says so.

        Raises:
            CheckpointError: The files are damaged.
        """
        if not (checkpoint / AVERAGE).is_dir():
            get_logger(__name__).warning("%s holds no averaged weights: the average starts here", checkpoint)
            return
        saved = ZeroCheckpoint(checkpoint, averaged=True, share=on_main)
        for partition, average in zip(self._partitions, self._averages, strict=True):
            copy_slices(saved, partition, average)
        self._updates = saved.num_updates

    def _decay_now(self) -> float:
        if not self._warmup:
            return self._decay
        slowest: float = 1.0 - (1.0 + self._updates) ** (-2.0 / 3.0)
        return min(self._decay, slowest)

    def _exchange(self) -> None:
        for master, average in zip(self._masters, self._averages, strict=True):
            parts = (tensor.view(-1).split(_EXCHANGED_ELEMENTS) for tensor in (master, average))
            for weights, averaged in zip(*parts, strict=True):
                before = weights.clone()
                weights.copy_(averaged)
                averaged.copy_(before)
        publish(self._engine)
