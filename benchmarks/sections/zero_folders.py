"""Checkpoint folders in the layout of DeepSpeed's ZeRO-3, of any size: filled, or with room for the numbers only."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

TAG = "global_step3"


def vit_shapes(width: int, depth: int) -> dict[str, tuple[int, ...]]:
    """Parameters of a plain ViT's blocks."""
    block = {
        "norm1.weight": (width,),
        "attn.qkv.weight": (3 * width, width),
        "attn.proj.weight": (width, width),
        "attn.proj.bias": (width,),
        "norm2.weight": (width,),
        "mlp.fc1.weight": (4 * width, width),
        "mlp.fc1.bias": (4 * width,),
        "mlp.fc2.weight": (width, 4 * width),
        "mlp.fc2.bias": (width,),
    }
    return {f"blocks.{index}.{name}": shape for index in range(depth) for name, shape in block.items()}


def write_zero3(folder: Path, shapes: Mapping[str, tuple[int, ...]], num_ranks: int, *, sparse: bool) -> int:
    """Writes masters and two moments of AdamW, as DeepSpeed 0.19.8 does on so many ranks.

    Args:
        folder: Gets ``latest`` and the tag.
        shapes: Of all parameters, which are one group.
        num_ranks: Among which each is cut.
        sparse: The files are holes where numbers would be, and read as zeros.

    Returns:
        Parameters in all.
    """
    part = sum(math.ceil(math.prod(shape) / num_ranks) for shape in shapes.values())
    tag = folder / TAG
    tag.mkdir(parents=True)
    for rank in range(num_ranks):
        flats = [torch.empty(part) if sparse else torch.randn(part) for _ in range(3)]
        name = f"zero_pp_rank_{rank}_mp_rank_00"
        with torch.serialization.skip_data() if sparse else contextlib.nullcontext():
            torch.save(_optimizer_states(flats, num_ranks), tag / f"{name}_optim_states.pt")
        torch.save(_model_states(shapes, num_ranks), tag / f"{name}_model_states.pt")
    (folder / "latest").write_text(TAG)
    return sum(math.prod(shape) for shape in shapes.values())


def _optimizer_states(flats: list[torch.Tensor], num_ranks: int) -> dict[str, Any]:
    master, first, second = flats
    states = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": first, "exp_avg_sq": second}}, "param_groups": [{}]}
    zero = {"zero_stage": 3, "partition_count": num_ranks, "fp32_flat_groups": [master], "optimizer_state_dict": states}
    return {"optimizer_state_dict": zero, "ds_version": "0.19.8"}


def _model_states(shapes: Mapping[str, tuple[int, ...]], num_ranks: int) -> dict[str, Any]:
    return {
        "module": {name: torch.empty(0, dtype=torch.bfloat16) for name in shapes},
        "buffer_names": [],
        "param_shapes": [{name: torch.Size(shape) for name, shape in shapes.items()}],
        "frozen_param_shapes": None,
        "frozen_param_fragments": None,
        "shared_params": {},
        "dp_world_size": num_ranks,
        "mp_world_size": 1,
        "global_steps": 3,
        "ds_version": "0.19.8",
    }
