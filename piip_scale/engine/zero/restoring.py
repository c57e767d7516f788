"""A checkpoint into an engine: every rank reads its own share of what any number of ranks wrote.

The files of a checkpoint are cut for the ranks and the ZeRO stage that wrote them. Each rank here asks for the elements
it keeps by parameter and position, wherever they lie, so neither has to be the same. DeepSpeed (0.19.8) itself resumes
on the same ranks and stage only, and over its universal checkpoints not without faults: every group takes the settings
of the first, all sub-groups count steps in one tensor, and parameters that are not trained are lost.
"""

from __future__ import annotations

from pathlib import Path

import torch

from piip_scale.agreement import on_main
from piip_scale.checkpoint.left_out import Given
from piip_scale.checkpoint.zero_reader import ZeroCheckpoint
from piip_scale.engine.zero.deepspeed_api import Engine
from piip_scale.engine.zero.partitions import Partition, frozen_parts, partitions_in_memory, publish
from piip_scale.errors import CheckpointError


def restore(engine: Engine, checkpoint: Path, given: Given | None = None) -> None:
    """Puts weights, optimiser state and buffers of a checkpoint into an engine. Collective.

    Settings of the optimiser's groups stay as the engine was built with. Memory: what the engine holds anyway.

    Args:
        engine: The engine, of the same model and optimiser groups.
        checkpoint: Its folder.
        given: Reads frozen weights that the checkpoint leaves to other files.

    Raises:
        CheckpointError: The files are damaged.
    """
    saved = ZeroCheckpoint(checkpoint, given=given, share=on_main)
    with torch.no_grad():
        for partition in partitions_in_memory(engine):
            copy_slices(saved, partition, partition.master)
            _restore_state(saved, partition)
        for part, data in frozen_parts(engine):
            saved.copy_slice(part.name, part.first, part.of(data))
        for name, weight in saved.weights.items():
            if weight.is_buffer:
                engine.module.get_buffer(name).copy_(saved[name])
    publish(engine)


def copy_slices(saved: ZeroCheckpoint, partition: Partition, out: torch.Tensor, state: str | None = None) -> None:
    """Fills a tensor that is cut as a partition's master weights are; its padding stays as it is.

    Args:
        saved: The checkpoint.
        partition: Says what lies where.
        out: Of the master's shape.
        state: As of ``ZeroCheckpoint.copy_slice``.
    """
    flat = out.view(-1)
    for part in partition.slices:
        saved.copy_slice(part.name, part.first, part.of(flat), state)


def _restore_state(saved: ZeroCheckpoint, partition: Partition) -> None:
    names = [part.name for part in partition.slices]
    moments = saved.moments(names[0]) if names else []
    for moment in moments:
        # Zero where nothing is, as in a state that grew from zero gradients.
        values = torch.zeros_like(partition.master, requires_grad=False)
        copy_slices(saved, partition, values, moment)
        partition.state[moment] = values
    if moments:
        partition.state["step"] = _counter(saved, names, partition)


def _counter(saved: ZeroCheckpoint, names: list[str], partition: Partition) -> torch.Tensor | float:
    """The one count of all the partition's parameters; a tensor of its own, on the device torch wants it on."""
    counts = {name: saved.counter(name) for name in names}
    first = counts[names[0]]
    for name, count in counts.items():
        if count != first:
            raise CheckpointError(
                f"{saved.folder}: {name} has had {int(count)} optimiser steps, {names[0]} {int(first)}",
                rule="parameters that are updated together have had equally many",
                fix="take another checkpoint",
            )
    if not isinstance(first, torch.Tensor):
        return first
    on_device = partition.settings.get("fused") or partition.settings.get("capturable")
    return first.clone().to(partition.master.device if on_device else "cpu")
