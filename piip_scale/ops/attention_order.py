"""Which attention kernel is fastest at a branch's own shape: measured where several could serve."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from piip_scale.errors import KernelError
from piip_scale.logging import get_logger
from piip_scale.ops.attention import attention, usable_attention_kernels

Timer = Callable[[Callable[[], object]], float]

_WARM_UPS, _ROUNDS = 3, 7


@dataclass(frozen=True)
class AttentionShape:
    """One attention of a training.

    Attributes:
        batch: Sequences: images, or their windows.
        heads: Heads.
        tokens: Tokens of a sequence.
        size: Channels of a head.
        biased: Whether a position bias is added to the scores.
        dtype: Of queries, keys and values.
    """

    batch: int
    heads: int
    tokens: int
    size: int
    biased: bool
    dtype: torch.dtype


def measure_attention(shape: AttentionShape, device: torch.device, timer: Timer | None = None) -> dict[str, float]:
    """Milliseconds of each kernel that can serve, forward and backward, the fastest first; empty where one alone can.

    A kernel that refuses the shape is left out, with a warning.

    Args:
        shape: What to compute.
        device: Where.
        timer: Milliseconds of a call; a CUDA device's own clock where ``None``.
    """
    names = usable_attention_kernels(device.type, shape.dtype, shape.size, shape.biased)
    if len(names) < 2:
        return {}
    found: dict[str, float] = {}
    for name in names:
        try:
            found[name] = (timer or _median_ms)(_pass(shape, name, device))
        except (RuntimeError, KernelError) as error:
            line = " ".join(str(error).split())
            get_logger(__name__).warning("attention kernel %s does not serve %s: %s", name, shape, line)
    return dict(sorted(found.items(), key=lambda item: item[1]))


def _pass(shape: AttentionShape, name: str, device: torch.device) -> Callable[[], Sequence[Tensor]]:
    sizes = (shape.batch, shape.heads, shape.tokens, shape.size)
    parts = [torch.randn(sizes, device=device, dtype=shape.dtype).requires_grad_() for _ in range(3)]
    query, key, value = parts
    square = (shape.heads, shape.tokens, shape.tokens)
    bias = torch.randn(square, device=device, dtype=shape.dtype).requires_grad_() if shape.biased else None
    wanted = parts if bias is None else [*parts, bias]

    def run() -> Sequence[Tensor]:
        output = attention(query, key, value, bias, kernel=name)
        return torch.autograd.grad(output, wanted, torch.ones_like(output))

    return run


def _median_ms(run: Callable[[], object]) -> float:
    for _ in range(_WARM_UPS):
        run()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(_ROUNDS)]
    for begin, end in events:
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return float(statistics.median(begin.elapsed_time(end) for begin, end in events))
