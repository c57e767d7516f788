"""ZeRO changes where numbers live, not what they are: every stage on every number of ranks against torch alone."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from piip_scale.config.detection import DetectionRun
from piip_scale.data.batch import DetectionBatch
from piip_scale.engine.step import seed_step, total_loss, train_step
from piip_scale.engine.zero.setup import build_engine
from piip_scale.tasks.detection.model import DetectionModel
from piip_scale.world import World
from sections.processes import run_ranks
from sections.record import table
from sections.subject import build, detector_config, made_up_batch

Case = tuple[str, int]
"""A kind of detector and a ZeRO stage."""

KINDS = ("mask_rcnn", "dino")
STAGES = (1, 2, 3)
RANKS = (1, 2, 4)
STEPS = 3
LR = 1e-4
CLIP = 1.0
GLOBAL_BATCH = 4
_RELEASED = {"zero_optimization": {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}}

FIRST_STEP_TOLERANCE = 1e-5
"""Relative, of the first step's loss and of its gradient's norm: float32 rounding."""
WEIGHTS_TOLERANCE = 1e-3
"""Of the weights' difference after ``STEPS`` steps, as a share of how far they moved (both as norms).

AdamW's first step moves a weight whose gradient is next to nothing by up to its rate either way, whatever its size, so
orders of summation show in such weights. MKL chooses them by a matrix's address, and ZeRO-3's gathered weights lie
anywhere in a buffer: one rank of DINO is 4e-4 apart after one step, 2e-5 where MKL_CBWR=COMPATIBLE has MKL add in
one order wherever matrices lie. Under ZeRO-1, whose weights stay where they were allocated, it is 2e-6 to 9e-6.
"""


@dataclass(frozen=True)
class Trained:
    """What a few steps gave.

    Attributes:
        losses: Mean over the step's images, step by step.
        norms: Of the whole gradient.
        weights: By name, float32.
        moved: Norm of how far the weights are from where they started.
    """

    losses: list[float]
    norms: list[float]
    weights: dict[str, np.ndarray]
    moved: float = math.nan


@dataclass(frozen=True)
class Difference:
    """How far a training is from another.

    Attributes:
        loss: Relative, of the first step's loss.
        norm: Relative, of the first step's gradient norm.
        weights: Norm of the difference of the weights over the norm of their movement.
        largest: Largest difference of a single weight, in learning rates.
    """

    loss: float
    norm: float
    weights: float
    largest: float


def section() -> str:
    """The table of all kinds, stages and numbers of ranks."""
    rows = []
    references = {kind: alone(kind) for kind in KINDS}
    for num_ranks in RANKS:
        cases = [(kind, stage) for kind in KINDS for stage in STAGES]
        for (kind, stage), trained in run_ranks(num_ranks, train, cases)[0].items():
            found = difference(trained, references[kind])
            figures = [f"{value:.1e}" for value in (found.loss, found.norm, found.weights, found.largest)]
            rows.append([f"{kind}, ZeRO-{stage}", num_ranks, *figures])
    head = ["", "ranks", "first loss", "first gradient norm", "weights", "largest, in learning rates"]
    return (
        f"Each against one process of torch alone (AdamW, float32, the same {GLOBAL_BATCH} images a step, each a "
        f"micro-batch of its own, with the same random numbers), relative differences; weights after {STEPS} steps, "
        "as a share of how far they moved. Tolerances of the tests: "
        f"{FIRST_STEP_TOLERANCE:g} for loss and norm, {WEIGHTS_TOLERANCE:g} for weights.\n\n" + table(head, rows)
    )


def train(world: World, _device: torch.device, cases: Iterable[Case]) -> dict[Case, Trained]:
    """Trains each case with the engine; weights from rank 0 only. Collective."""
    return {(kind, stage): _train(world, kind, stage) for kind, stage in cases}


def _train(world: World, kind: str, stage: int) -> Trained:
    config = detector_config(
        kind,
        optimizer={"lr": LR, "clip_grad_norm": CLIP},
        zero={"stage": stage, "deepspeed": _RELEASED if stage == 3 else {}},
        train={"steps": STEPS, "precision": "fp32", "gradient_accumulation": GLOBAL_BATCH // world.num_ranks},
    )
    engine, _ = build_engine(build(config), config, world)
    losses, norms = [], []
    for step in range(STEPS):
        mine = _batches(step)[world.rank :: world.num_ranks]
        result = train_step(engine, mine, step, 0, world)
        loss = total_loss(result.losses)
        torch.distributed.all_reduce(loss)
        losses.append(loss.item() / world.num_ranks)
        norms.append(result.grad_norm)
    return Trained(losses, norms, _weights(engine.module, world, gather=stage == 3))


def _batches(step: int) -> list[DetectionBatch]:
    return [made_up_batch(step * GLOBAL_BATCH + index) for index in range(GLOBAL_BATCH)]


def _weights(model: nn.Module, world: World, *, gather: bool) -> dict[str, np.ndarray]:
    from deepspeed import zero

    with zero.GatheredParameters(list(model.parameters()), enabled=gather):
        return {n: p.detach().numpy().copy() for n, p in model.named_parameters() if world.is_main}


def alone(kind: str) -> Trained:
    """The reference: torch's AdamW over the model's own rules, nothing of the engine but the micro-batches' seeds."""
    # As a rank does: with two threads, sums round otherwise, and where a gradient is all but zero, AdamW's first step
    # makes a learning rate's difference of that.
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _alone(kind)
    finally:
        torch.set_num_threads(num_threads)


def _alone(kind: str) -> Trained:
    config = detector_config(kind)
    model = build(config).train()
    start = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(_groups(model, config), lr=LR, betas=config.optimizer.betas)
    losses, norms = [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        total = 0.0
        for index, batch in enumerate(_batches(step)):
            seed_step(0, step, index)
            named: dict[str, torch.Tensor] = model(batch)
            loss = torch.stack([value for name, value in named.items() if "loss" in name]).sum()
            (loss / GLOBAL_BATCH).backward()
            total += loss.item() / GLOBAL_BATCH
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), CLIP).item())
        optimizer.step()
        losses.append(total)
    weights = {name: p.detach().numpy() for name, p in model.named_parameters()}
    moved = _norm({name: weight - start[name] for name, weight in weights.items()})
    return Trained(losses, norms, weights, moved)


def _groups(model: DetectionModel, config: DetectionRun) -> list[dict[str, object]]:
    rules = model.parameter_rules()
    decay = config.optimizer.weight_decay
    return [{"params": [p], "weight_decay": decay * rules[n].decays} for n, p in model.named_parameters()]


def difference(found: Trained, expected: Trained) -> Difference:
    """How far one training is from another."""
    apart = {name: found.weights[name] - weight for name, weight in expected.weights.items()}
    return Difference(
        loss=abs(found.losses[0] / expected.losses[0] - 1),
        norm=abs(found.norms[0] / expected.norms[0] - 1),
        weights=_norm(apart) / expected.moved,
        largest=max(float(np.abs(array).max()) for array in apart.values()) / LR,
    )


def _norm(arrays: dict[str, np.ndarray]) -> float:
    return float(np.sqrt(sum(float(np.square(array, dtype=np.float64).sum()) for array in arrays.values())))
