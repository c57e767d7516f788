"""How tensors of a file do not fit a model, in a line."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

_MISFITS_SHOWN = 3


def list_misfits(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, dict[str, str]]:
    """How tensors do not fit a model: by kind of misfit, what to say of each name.

    Args:
        found: By the model's names.
        wanted: The model's, on any device, for their names and shapes.
    """
    misshaped = {
        name: f"{name} {list(found[name].shape)} for {list(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in found and found[name].shape != tensor.shape
    }
    return {
        "missing": {name: name for name in wanted if name not in found},
        "unexpected": {name: name for name in found if name not in wanted},
        "of another shape": misshaped,
    }


def describe_misfits(misfits: Mapping[str, Mapping[str, str]]) -> str:
    """What ``list_misfits`` found, in a line."""
    parts = []
    for what, names in misfits.items():
        shown = list(names.values())[:_MISFITS_SHOWN]
        if names:
            parts.append(f"{len(names)} {what} ({', '.join(shown)}{', ...' if len(names) > len(shown) else ''})")
    return "; ".join(parts)
