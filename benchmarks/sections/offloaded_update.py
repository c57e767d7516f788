"""AdamW over master weights in host memory: torch's fused kernel against DeepSpeed's, on the same flat tensors."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.multiprocessing
from torch import Tensor

from piip_scale.config.run import OptimizerConfig
from piip_scale.engine.optim import build_optimizer
from piip_scale.engine.zero.extensions import load_extension
from piip_scale.errors import KernelError
from sections.record import table

_ELEMENTS = 20_000_000
_REPEATS = 15
_STEPS_COMPARED = 5
_CONFIG = OptimizerConfig(lr=1e-3)


def section() -> str:
    """Medians of an update by each, on one and two threads, and how far apart their weights are."""
    rows = []
    for threads in (1, 2):
        try:
            taken = _on_threads(threads, _measured)
        except KernelError as error:
            return f"Not measured: {error.line}."
        ratios = [a / b for a, b in zip(taken["torch"], taken["deepspeed"], strict=True)]
        best = {name: min(values) for name, values in taken.items()}
        rows.append(
            [
                threads,
                *(f"{median(values):.0f}" for values in taken.values()),
                *(f"{value:.0f}" for value in best.values()),
                f"{median(ratios):.2f}",
                f"{best['torch'] / best['deepspeed']:.2f}",
            ]
        )
    header = ["threads", "torch, ms", "DeepSpeed, ms", "torch, best", "DeepSpeed, best", "ratio", "of the best"]
    worst, share = _on_threads(1, _difference)
    return (
        f"{_REPEATS} updates of {_ELEMENTS / 1e6:.0f} M float32 weights each, in turn: medians, the best, "
        "and torch's time over DeepSpeed's, the median of neighbours and of the best. After "
        f"{_STEPS_COMPARED} steps from the same weights and gradients the results differ by at most {worst:.1e} "
        f"learning rates, {share:.1e} of the movement. Torch's "
        f"stays: it is as fast and needs no compiler. Load average at the end: {os.getloadavg()[0]:.1f}.\n\n"
        + table(header, rows)
    )


def _on_threads(threads: int, function: Callable[[], Any]) -> Any:
    """What a function returns in a process of its own: the two kernels bring an OpenMP each, which read this once."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    with torch.multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function)


def _weights(numel: int = _ELEMENTS) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    weights = torch.nn.Parameter(torch.randn(numel, generator=generator))
    weights.grad = torch.randn(numel, generator=generator)
    return weights


def _torchs(weights: Tensor) -> Any:
    return build_optimizer([{"params": [weights]}], _CONFIG)


def _deepspeeds(weights: Tensor) -> Any:
    from deepspeed.ops.adam import DeepSpeedCPUAdam
    from deepspeed.ops.op_builder import CPUAdamBuilder

    load_extension(CPUAdamBuilder(), "this measurement")
    groups = [{"params": [weights]}]
    return DeepSpeedCPUAdam(groups, lr=_CONFIG.lr, betas=_CONFIG.betas, weight_decay=_CONFIG.weight_decay)


def _measured() -> dict[str, list[float]]:
    """Milliseconds of each update, taken in turn so that both see the same machine."""
    optimizers = {"torch": _torchs(_weights()), "deepspeed": _deepspeeds(_weights())}
    taken: dict[str, list[float]] = {name: [] for name in optimizers}
    for optimizer in optimizers.values():
        optimizer.step()
    for _ in range(_REPEATS):
        for name, optimizer in optimizers.items():
            taken[name].append(_ms(optimizer.step))
    return taken


def _ms(call: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    call()
    return (time.perf_counter() - begun) * 1e3


def _difference() -> tuple[float, float]:
    """The largest difference in learning rates, and all of it as a share of the movement."""
    start = _weights(_ELEMENTS // 20)
    ours, theirs = (torch.nn.Parameter(start.detach().clone()) for _ in range(2))
    optimizers = _torchs(ours), _deepspeeds(theirs)
    for step in range(_STEPS_COMPARED):
        gradient = torch.randn(start.shape, generator=torch.Generator().manual_seed(step))
        for weights, optimizer in zip((ours, theirs), optimizers, strict=True):
            weights.grad = gradient
            optimizer.step()
    apart = (ours - theirs).detach()
    return apart.abs().max().item() / _CONFIG.lr, (apart.norm() / (ours - start).detach().norm()).item()
