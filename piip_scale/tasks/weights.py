"""Reads converted weights into a model, and reports what does not fit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from piip_scale.errors import ModelError
from piip_scale.files import LACKS_MEMORY_FIX, lacks_memory

_NUM_NAMED = 3


@torch.no_grad()
def load_weights(model: nn.Module, path: Path) -> None:
    """Copies weights into a model, tensor by tensor; its dtype and device stay.

    Args:
        model: The model; parameters it uses under several names need one of them.
        path: A safetensors file, or a folder of them.

    Raises:
        ModelError: The file is absent or damaged, or names or shapes are not the model's; nothing is copied then.
    """
    from safetensors import SafetensorError, safe_open

    try:
        files = [safe_open(file, framework="pt") for file in _files(path)]
        shapes = {name: tuple(file.get_slice(name).get_shape()) for file in files for name in file.keys()}  # noqa: SIM118
        state = model.state_dict(keep_vars=True)
        _check(state, shapes, path)
        for file in files:
            for name in file.keys():  # noqa: SIM118 - not a dict
                state[name].copy_(file.get_tensor(name))
    except (SafetensorError, OSError, MemoryError) as error:
        fix = LACKS_MEMORY_FIX if lacks_memory(error) else "convert the checkpoint again"
        raise ModelError(f"weights {path} cannot be read", value=str(error), fix=fix) from None


def _files(path: Path) -> list[Path]:
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise ModelError(
            "weights not found",
            value=str(path),
            rule="a .safetensors file, or a folder of them",
            fix="`piip-scale convert RUN OUT.safetensors` makes it from a checkpoint",
        )
    return files


def _check(state: dict[str, Tensor], shapes: dict[str, tuple[int, ...]], path: Path) -> None:
    present = {id(state[name]) for name in shapes if name in state}
    missing = [name for name, tensor in state.items() if id(tensor) not in present]
    unexpected = [name for name in shapes if name not in state]
    misshaped = [
        f"{name} {list(shape)} for {list(state[name].shape)}"
        for name, shape in shapes.items()
        if name in state and shape != tuple(state[name].shape)
    ]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": misshaped}
    if any(problems.values()):
        listed = "; ".join(f"{len(names)} {what} ({_some(names)})" for what, names in problems.items() if names)
        raise ModelError(
            f"weights {path} are not this config's model: {listed}", fix="use the config of the run they come from"
        )


def _some(names: Sequence[str] | Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:_NUM_NAMED]) + (", ..." if len(names) > _NUM_NAMED else "")
