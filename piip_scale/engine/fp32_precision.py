"""How a GPU multiplies float32 numbers: one choice of the run where torch has two, for convolutions and the rest."""

from __future__ import annotations

from typing import Literal

import torch

from piip_scale.config.run import TrainConfig

_MEANINGS = {
    "tf32": "their factors rounded to 10 bits of mantissa, their sums in float32",
    "ieee": "as float32 is",
}


def fp32_precision(train: TrainConfig) -> Literal["ieee", "tf32"]:
    """What ``auto`` stands for: who trains in float32 wants it, heads behind a network in bf16 do not gain by it."""
    if train.fp32_precision == "auto":
        return "ieee" if train.precision == "fp32" else "tf32"
    return train.fp32_precision


def apply_fp32_precision(train: TrainConfig) -> None:
    """Has CUDA's matrix products and convolutions alike compute so, in this process."""
    rounds = fp32_precision(train) == "tf32"
    # Not torch's newer names for single backends: with them torch refuses to name one precision, which compiling asks.
    torch.backends.cuda.matmul.allow_tf32 = rounds
    torch.backends.cudnn.allow_tf32 = rounds


def fp32_precision_lines(train: TrainConfig, device: torch.device) -> list[str]:
    """What the start report says of it."""
    if device.type != "cuda":
        return []
    chosen = fp32_precision(train)
    return [f"products and convolutions in float32, the heads' among them: {chosen}, {_MEANINGS[chosen]}"]
