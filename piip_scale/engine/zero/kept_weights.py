"""What a backward pass keeps of a gathered weight: the parameter, whose memory can go meanwhile, never that memory.

Torch's linear layer keeps a view of its weight, and with it all of a matrix that ZeRO-3 has gathered. Therefore
DeepSpeed (0.19.8) puts a function of its own in its place, which is Python and adds the bias in a pass of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


@dataclass(frozen=True)
class _View:
    """All elements of a parameter, in some order."""

    parameter: nn.Parameter
    shape: torch.Size
    strides: tuple[int, ...]


def keeping_parameters(compute: Callable[..., Any], parameters: Sequence[nn.Parameter]) -> Callable[..., Any]:
    """``compute`` whose backward pass reads parameters as they are then: it must find them gathered again.

    Only for what is not compiled: programs keep the parameters that they are given as such.

    Args:
        compute: Any function of gathered parameters.
        parameters: Those whose memory must not be kept.
    """

    def computation(*arguments: Any) -> Any:
        gathered = {parameter.data_ptr(): parameter for parameter in parameters}

        def pack(tensor: Tensor) -> Tensor | _View:
            parameter = gathered.get(tensor.data_ptr())
            if parameter is None or tensor.numel() != parameter.numel():
                return tensor
            return _View(parameter, tensor.shape, tensor.stride())

        with saved_tensors_hooks(pack, _unpack):
            return compute(*arguments)

    return computation


def _unpack(kept: Tensor | _View) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    whole = kept.parameter.detach()
    return whole.as_strided(kept.shape, kept.strides, whole.storage_offset())
