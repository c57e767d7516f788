"""The backbone among a file's tensors, whether these are numbers that a branch can start from, and what file it is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from piip_scale.errors import ModelError
from piip_scale.models.joined import Joined, Value

_NETWORKS = ("model_ema.", "teacher.", "backbone.")
"""What names of one network begin with where there are others beside it; averages before what they are averages of."""
_OWNERS = ("radio_model.", "detector.", "detector_model.")
"""What C-RADIO and SAM 3 are called by their owners, who say further inside where the backbone is."""
SAFETENSORS = ".safetensors"
_ZIP, _LENGTH_BYTES = b"PK\x03\x04", 8
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def backbone_in(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors without what wrappers (of a compiler, of parallel training, of a task) put before all of their names."""
    if any(name.startswith(_OWNERS) for name in tensors):
        return dict(tensors)
    for network in _NETWORKS:
        inside = {name.removeprefix(network): value for name, value in tensors.items() if name.startswith(network)}
        if inside:
            return backbone_in(inside)
    first = {name.partition(".")[0] for name in tensors}
    if len(first) == 1 and all("." in name for name in tensors):
        return backbone_in({name.partition(".")[2]: value for name, value in tensors.items()})
    return dict(tensors)


def require_values(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raises a ``ModelError`` where a tensor of a pickle has no values, or not one for each of its places."""
    for name, tensor in tensors.items():
        if tensor.is_meta or tensor.layout != torch.strided:
            raise ModelError(
                f"pretrained weights {where}: {name} is no plain tensor",
                value="one without values" if tensor.is_meta else str(tensor.layout),
                rule="every tensor has a value for each of its places",
                fix="save it again from a model on a device, dense",
            )


def not_floats(value: Value) -> str:
    """The type of what are no floats, as those of quantised files, which are numbers of something; else nothing."""
    parts = value.parts if isinstance(value, Joined) else (value,)
    return next((str(part.dtype) for part in parts if part.dtype not in _FLOATS), "")


def name_it_deserves(path: Path) -> str:
    """What to call a readable file that has the suffix of another format; else nothing."""
    try:
        with path.open("rb") as file:
            start = file.read(_LENGTH_BYTES + 1)
    except OSError:  # whoever reads the file says why
        return ""
    if path.suffix == SAFETENSORS:
        return "name it .pth: it is a pickle" if start.startswith(_ZIP) else ""
    return f"name it {SAFETENSORS}, as it is one" if start[_LENGTH_BYTES:] == b"{" else ""
