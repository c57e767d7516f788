"""The way from a gradient to a moved weight at PIIP-H6B's structure: ours and DeepSpeed's, in turns in one process."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any, cast
from unittest import mock

import torch

from piip_scale.config.detection import DetectionRun
from piip_scale.config.loading import load_config
from piip_scale.engine.step import seed_step, total_loss
from piip_scale.engine.zero import setup
from piip_scale.tasks.detection.model import build_detection_model
from piip_scale.world import World
from sections.gpu.backbone import CONFIGS, H6B
from sections.processes import run_ranks
from sections.record import table
from sections.subject import NUM_CLASSES, TINY_H6B, made_up_batch

_ROUNDS, _WARM_UP = 7, 2
_SIZE_PX = 128
_ADAMW = torch.optim.AdamW


def section() -> str:
    """The table of both ways on one rank."""
    found = run_ranks(1, measured)[0]
    rows = [[name, *(f"{found[way][name]:,.0f}" for way in found)] for name in next(iter(found.values()))]
    return (
        f"Medians of {_ROUNDS} rounds in turns, milliseconds of processor time, one thread, one rank, "
        f"PIIP-H6B's structure at tiny widths, bf16, ZeRO-3, layer decay.\n\n" + table(["", *found], rows)
    )


def measured(world: World, _device: torch.device) -> dict[str, dict[str, float]]:
    """Milliseconds of backward pass and update, and group visits of an update, of both ways."""
    torch.set_num_threads(1)
    theirs = mock.patch.object(setup, "shorten_update", return_value=None)
    with theirs:
        ways = {"DeepSpeed's": _engine(world)}
    ways["ours"] = _engine(world)
    spent: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for number in range(_WARM_UP + _ROUNDS):
        for way, engine in ways.items():
            spent[way].append(_step(engine, number))
    return {
        way: {
            "backward ms": median(backward for backward, _ in spent[way][_WARM_UP:]),
            "update ms": median(update for _, update in spent[way][_WARM_UP:]),
            "optimiser groups": len(engine.optimizer.param_groups),
            "group visits": _visits(engine),
        }
        for way, engine in ways.items()
    }


def _engine(world: World) -> Any:
    config = cast("DetectionRun", load_config(CONFIGS / H6B.config, [*TINY_H6B, "model.branches.1.embed_dim=64"]))
    engine, _ = setup.build_engine(build_detection_model(config, NUM_CLASSES, network_device="meta"), config, world)
    return engine


def _step(engine: Any, number: int) -> tuple[float, float]:
    seed_step(0, number)
    loss = total_loss(engine(made_up_batch(0, 1, _SIZE_PX)))
    return _ms(lambda: engine.backward(loss)), _ms(engine.step)


def _ms(run: Callable[[], Any]) -> float:
    begun = time.process_time()
    run()
    return (time.process_time() - begun) * 1e3


def _visits(engine: Any) -> int:
    with mock.patch.object(_ADAMW, "_init_group", autospec=True, side_effect=_ADAMW._init_group) as visited:
        _step(engine, 0)
    return visited.call_count
