"""Messages of one optimiser step, by kind, against the formula."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn

from piip_scale.engine.step import train_step
from piip_scale.engine.zero.plan import measure
from piip_scale.engine.zero.setup import build_engine
from piip_scale.models.unit import Unit
from piip_scale.world import World
from sections.processes import run_ranks
from sections.record import table
from sections.spy import CollectiveSpy
from sections.subject import build, detector_config, made_up_batch

# Nothing stays gathered for reuse, and nothing comes before it is used: as in a model far larger than a device.
RELEASED = {
    "zero_optimization": {
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 0,
    }
}
_MIB = 2**20
_TEXT = (
    "One step of a Mask R-CNN under ZeRO-3 in bf16 on 2 ranks, nothing kept for reuse. By the formula, S sharded, R "
    "resident and T trainable elements: all-gathers of 2S bytes in the forward pass and of 2S in the backward pass, a "
    "message a unit, checkpointed or not; one of 2R after the update, and a reduction of 4T in fp32. "
    "Neck, heads, small branch and interactions call nothing in their forward pass."
)
_WARM_UP = 2


def section() -> str:
    """The table of stage 3 in bf16 on 2 ranks, with and without activation checkpointing."""
    rows = []
    for checkpoint in (False, True):
        found = run_ranks(2, step_messages, checkpoint)[0]
        for phase, kind, formula in _formula(found):
            messages = [m for m in found["messages"] if (m.phase, m.kind) == (phase, kind)]
            sent = sum(message.num_bytes for message in messages)
            label = f"{kind}, {phase}{', checkpointed blocks' if checkpoint else ''}"
            rows.append([label, len(messages), f"{sent / _MIB:.2f}", f"{formula / _MIB:.2f}"])
        covered = {(phase, kind) for phase, kind, _ in _formula(found)}
        others = [m for m in found["messages"] if (m.phase, m.kind) not in covered]
        small = sum(message.num_bytes for message in others)
        rows.append(["all others (norms, flags)", len(others), f"{small / _MIB:.4f}", "-"])
    return f"{_TEXT}\n\n{table(['message', 'calls', 'MiB', 'by the formula'], rows)}"


def _formula(found: dict[str, Any]) -> list[tuple[str, str, int]]:
    return [
        ("forward", "all-gather", 2 * found["sharded"]),
        ("backward", "all-gather", 2 * found["sharded"]),
        ("backward", "reduce-scatter", 4 * found["trainable"]),
        ("update", "all-gather", 2 * found["resident"]),
    ]


def step_messages(world: World, _device: torch.device, checkpoint: bool, precision: str = "bf16") -> dict[str, Any]:
    """This rank's messages in a step whose order of modules is known, and the sizes they should follow from."""
    config = detector_config(
        large_dim=128,
        depth=4,
        checkpoint_blocks=checkpoint,
        zero={"stage": 3, "deepspeed": RELEASED},
        train={"steps": 1, "precision": precision},
    )
    model = build(config)
    parts = model.parts()
    engine, plan = build_engine(model, config, world)
    for step in range(_WARM_UP):
        train_step(engine, [made_up_batch(world.rank)], step, 0, world)
    spy = CollectiveSpy()
    _tell_phases(engine, spy)
    watched = {name: part for name, part in parts.items() if name != "branch 0"}
    with spy, spy.watching(watched):
        train_step(engine, [made_up_batch(world.rank)], _WARM_UP, 0, world)
    sizes = measure(model, parts).parameters
    padded = {p.name: -(-p.numel // world.num_ranks) * world.num_ranks for p in sizes}
    return {
        "messages": spy.messages,
        "watched": list(watched),
        "sharded": sum(padded[p.name] for p in sizes if plan.shards(p)),
        "sharded_by_unit": _by_unit(model, {p.name: padded[p.name] for p in sizes if plan.shards(p)}),
        "resident": sum(padded[p.name] for p in sizes if not plan.shards(p)),
        "trainable": sum(padded[p.name] for p in sizes if p.trainable),
    }


def _by_unit(model: nn.Module, elements: dict[str, int]) -> list[int]:
    """Elements that are gathered together: those of a unit, outside of units those of a module."""
    units = [f"{name}." for name, unit in model.named_modules() if isinstance(unit, Unit)]
    together: Counter[str] = Counter()
    for name, numel in elements.items():
        together[next((unit for unit in units if name.startswith(unit)), name.rpartition(".")[0])] += numel
    return list(together.values())


def _tell_phases(engine: Any, spy: CollectiveSpy) -> None:
    for name, phase in (("forward", "forward"), ("backward", "backward"), ("step", "update")):
        setattr(engine, name, _entering(getattr(engine, name), spy, phase))


def _entering(method: Any, spy: CollectiveSpy, phase: str) -> Any:
    def entered(*args: Any, **kwargs: Any) -> Any:
        spy.phase = phase
        return method(*args, **kwargs)

    return entered
