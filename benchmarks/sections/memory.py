"""Bytes that each rank keeps, by kind, against the arithmetic of the start report."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from piip_scale.engine.report import bytes_per_rank
from piip_scale.engine.step import train_step
from piip_scale.engine.zero.deepspeed_api import Engine
from piip_scale.engine.zero.plan import Part, measure
from piip_scale.engine.zero.setup import build_engine
from piip_scale.world import World
from sections.processes import run_ranks
from sections.record import table
from sections.subject import build, detector_config, made_up_batch

KINDS = ("weights", "gradients", "optimizer")
_MIB = 2**20
_CPU = {"offload_optimizer": "cpu"}
_CASES: tuple[tuple[str, dict[str, Any], str, int], ...] = (
    ("stage 0", {"stage": 0}, "fp32", 1),
    ("stage 3", {"stage": 3}, "fp32", 2),
    ("stage 1", {"stage": 1}, "bf16", 2),
    ("stage 2", {"stage": 2}, "bf16", 2),
    ("stage 3", {"stage": 3}, "bf16", 1),
    ("stage 3", {"stage": 3}, "bf16", 2),
    ("stage 3", {"stage": 3}, "bf16", 4),
    ("stage 3, optimiser offloaded", {"stage": 3, **_CPU}, "bf16", 2),
    ("stage 3, parameters too", {"stage": 3, "offload_parameters": "cpu", **_CPU}, "bf16", 2),
    ("stage 3, hpZ of 2", {"stage": 3, "node_partition": 2}, "bf16", 4),
)
# A parameter, its slice, and hpZ's second copy.
_WEIGHTS = ("data", "ds_tensor", "ds_secondary_tensor")
# Where DeepSpeed's optimisers keep gradients: stage 3; 1 and 2; 1 in bf16.
_GRADIENTS = (
    "grad_partitions_flat_buffer",
    "averaged_gradients",
    "grads_in_partition",
    "all_grad_tensors",
    "fp32_groups_gradients_flat",
)


def section() -> str:
    """The table for every stage, some precisions and numbers of ranks."""
    rows = []
    for label, zero, precision, ranks in _CASES:
        found = run_ranks(ranks, rank_bytes, zero, precision)[0]
        cells = [f"{found[kind] / _MIB:.1f} / {found['expected'][kind] / _MIB:.1f}" for kind in KINDS]
        per_parameter = sum(found[kind] for kind in KINDS) / found["parameters"]
        rows.append([f"{precision}, {label}", ranks, *cells, f"{per_parameter:.2f}", f"{found['rest'] / _MIB:.1f}"])
    head = ["", "ranks", *(f"{kind}, MiB" for kind in KINDS), "bytes a parameter", "other tensors, MiB"]
    return (
        "Measured / computed by the start report, on rank 0, when the step's gradients are whole, of a Mask R-CNN of "
        f"{found['parameters'] / 1e6:.1f} M parameters, {found['sharded'] / 1e6:.1f} M of them sharded. Every tensor "
        "that Python can reach counts, once by storage; the other tensors are buckets for messages (in stage 3, fp32 "
        "of the whole of so small a model) and, under offloading, a second copy of the gradients.\n\n"
        + table(head, rows)
    )


def rank_bytes(world: World, _device: torch.device, zero: dict[str, Any], precision: str) -> dict[str, Any]:
    """This rank's bytes by kind at the end of the second step's backward pass, and what the report says of them."""
    config = detector_config(large_dim=256, depth=6, zero=zero, train={"steps": 2, "precision": precision})
    model = build(config)
    engine, plan = build_engine(model, config, world)
    whole = Part("all", measure(engine.module, model.parts()).parameters)
    train_step(engine, [made_up_batch(world.rank)], 0, 0, world)
    found: dict[str, Any] = {}
    update = engine.step

    def look_first() -> None:
        found.update(by_kind(engine))
        update()

    engine.step = look_first
    train_step(engine, [made_up_batch(world.rank)], 1, 0, world)
    expected = bytes_per_rank(whole, plan)
    sharded = sum(p.numel for p in whole.parameters if plan.shards(p))
    return found | {
        "parameters": whole.numel,
        "sharded": sharded,
        "expected": {kind: getattr(expected, kind) for kind in KINDS},
    }


def by_kind(engine: Engine) -> dict[str, int]:
    """Bytes of all storages by what they are for; a storage of two kinds counts in the first."""
    adam = getattr(engine.optimizer, "optimizer", engine.optimizer)
    kinds = {
        "weights": [
            t
            for p in engine.module.parameters()
            for t in (p.data, getattr(p, "ds_tensor", None), getattr(p, "ds_secondary_tensor", None))
        ],
        "optimizer": [*(t for state in adam.state.values() for t in state.values()), *_masters(engine)],
        "gradients": _gradients(engine),
        "rest": [item for item in gc.get_objects() if type(item) in (Tensor, torch.nn.Parameter)],
    }
    seen: set[int] = set()
    return {kind: _new_bytes(tensors, seen) for kind, tensors in kinds.items()}


def _masters(engine: Engine) -> list[Tensor]:
    # As stage 3, stages 1 and 2, and stage 1 in bf16 call them.
    names = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")
    return [tensor for name in names for tensor in getattr(engine.optimizer, name, ())]


def _gradients(engine: Engine) -> Iterator[Tensor]:
    yield from _tensors([[p.grad, getattr(p, "grad_accum", None)] for p in engine.module.parameters()])
    for name in _GRADIENTS:
        yield from _tensors(getattr(engine.optimizer, name, None))


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        yield from _tensors(list(tree.values()))
    elif isinstance(tree, list | tuple):
        for item in tree:
            yield from _tensors(item)


def _new_bytes(tensors: Iterable[Any], seen: set[int]) -> int:
    total = 0
    for tensor in _tensors(list(tensors)):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total
