"""Time of a step under ZeRO-3 against plain data parallel on the same small model, and where the difference goes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from piip_scale.engine.step import seed_step, total_loss
from piip_scale.engine.zero.setup import build_engine
from piip_scale.world import World
from sections.processes import run_ranks
from sections.record import table
from sections.subject import build, detector_config, made_up_batch

PHASES = ("forward", "backward", "update")
_STEP, _CPU = "step", "step, CPU time"
_WARM_UP, _STEPS = 3, 12


def section() -> str:
    """The table of medians on 2 ranks, by phase."""
    ways = {
        "DDP": run_ranks(2, plain_ms)[0],
        **{f"ZeRO-{stage}": run_ranks(2, zero_ms, stage)[0] for stage in (1, 3)},
    }
    rows = [
        [phase, *(f"{way[phase]:.0f}" for way in ways.values()), f"{ways['ZeRO-3'][phase] - ways['DDP'][phase]:+.0f}"]
        for phase in (*PHASES, _STEP, _CPU)
    ]
    return (
        f"Medians of {_STEPS} steps on rank 0 of 2, in ms, one thread a rank; Mask R-CNN in float32, one image of "
        f"{made_up_batch(0).images_BHWC.shape[1]} px a rank. DDP is torch's, with torch's fused AdamW. ZeRO-3 gathers "
        "in the forward and backward pass, reduces in the backward pass, and gathers residents in the update. Times "
        "are a clock's, but in the last row the process's own, which other work on the machine leaves alone; load "
        f"average at the end: {os.getloadavg()[0]:.1f}.\n\n" + table(["", *ways, "ZeRO-3 over DDP"], rows)
    )


def plain_ms(world: World, _device: torch.device) -> dict[str, float]:
    """Milliseconds by phase of torch's own data parallel."""
    config = detector_config()
    model = build(config).train()
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def update() -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return _measured(world, lambda batch: total_loss(parallel(batch)), Tensor.backward, update)


def zero_ms(world: World, _device: torch.device, stage: int) -> dict[str, float]:
    """Milliseconds by phase of the engine."""
    config = detector_config(
        zero={"stage": stage},
        train={"steps": 1, "precision": "fp32"},
        optimizer={"clip_grad_norm": 1.0},
    )
    engine, _ = build_engine(build(config), config, world)
    return _measured(world, lambda batch: total_loss(engine(batch)), engine.backward, engine.step)


def _measured(
    world: World, forward: Callable[..., Any], backward: Callable[..., Any], update: Callable[[], Any]
) -> dict[str, float]:
    taken: dict[str, list[float]] = {phase: [] for phase in (*PHASES, _STEP, _CPU)}
    for step in range(_WARM_UP + _STEPS):
        seed_step(0, step, world.rank)
        batch = made_up_batch(world.rank)
        # Ranks start together, or one's wait for the other would be in the figures.
        torch.distributed.barrier()
        begun = time.process_time()
        marks = [time.perf_counter()]
        loss = forward(batch)
        marks.append(time.perf_counter())
        backward(loss)
        marks.append(time.perf_counter())
        update()
        marks.append(time.perf_counter())
        if step >= _WARM_UP:
            for phase, begin, end in zip(PHASES, marks, marks[1:], strict=False):
                taken[phase].append((end - begin) * 1e3)
            taken[_STEP].append((marks[-1] - marks[0]) * 1e3)
            taken[_CPU].append((time.process_time() - begun) * 1e3)
    return {phase: float(median(values)) for phase, values in taken.items()}
