"""Devices that this machine has not: tensors with values, which say they are there, and refuse to meet others.

As torch's own ``FakeTensorMode``, but with values, so that what depends on them can be run: heads that follow what they
find. A tensor lies on the CPU and is wrapped; an operator of wrapped tensors computes on what is inside.
"""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

_MOVES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}


class Pretended(torch.Tensor):
    """A tensor on the CPU that says it is elsewhere."""

    @staticmethod
    def __new__(cls, real, device):
        wrapped = torch.Tensor._make_wrapper_subclass(
            cls,
            real.shape,
            strides=real.stride(),
            storage_offset=real.storage_offset(),
            dtype=real.dtype,
            device=device,
        )
        wrapped.held = real
        return wrapped

    # What torch computes of the memory itself, past every operator.
    def tolist(self):
        return self.cpu().tolist()

    def new_tensor(self, values, dtype=None):
        return torch.tensor(values, dtype=dtype or self.dtype).to(self.device)

    def as_subclass(self, kind):
        return self

    def __getitem__(self, index):
        parts = index if isinstance(index, tuple) else (index,)
        here = (self.new_tensor(part, torch.long) if isinstance(part, list) else part for part in parts)
        return super().__getitem__(tuple(here))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _computed(func, args, kwargs or {})


class _Devices(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _computed(func, args, kwargs or {})


def noting_current(monkeypatch):
    """Which devices are made current, each time, from now on."""
    made_current = []

    @contextmanager
    def current(device):
        made_current.append(device)
        yield

    monkeypatch.setattr(torch.cuda, "device", current)
    return made_current


@contextmanager
def pretended_gpus(monkeypatch):
    """Inside, tensors can be made on any number of GPUs, and moved there; yields which was made current, each time."""
    # As FakeTensorMode does it, which torch tells apart by itself.
    torch._C._ensureCUDADeviceGuardSet()
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    made_current = noting_current(monkeypatch)
    # A module's parameters keep their type otherwise, which is not that of the wrapped.
    overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        # Its kernels are none of the CPU's.
        with torch.backends.cudnn.flags(enabled=False), _Devices():
            yield made_current
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(overwrites)


def _computed(func, args, kwargs):
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    # torch takes a number from the CPU wherever the others are.
    devices = {tensor.device for tensor in tensors if tensor.dim() or isinstance(tensor, Pretended)}
    if len(devices) > 1 and func not in _MOVES:
        raise RuntimeError(f"{func} of tensors on {', '.join(sorted(map(str, devices)))}")
    first = tensors[0].device if func in _MOVES else next(iter(devices), "cpu")
    device = torch.device(kwargs.get("device") or first)
    if device.type == "cuda" and "device" in kwargs:
        kwargs = kwargs | {"device": torch.device("cpu")}
    known = {id(tensor.held): tensor for tensor in tensors if isinstance(tensor, Pretended)}
    inside = tree_map(lambda leaf: leaf.held if isinstance(leaf, Pretended) else leaf, (args, kwargs))
    found = func(*inside[0], **inside[1])
    if device.type != "cuda":
        return found

    def wrapped(leaf):
        if not isinstance(leaf, torch.Tensor):
            return leaf
        return known[id(leaf)] if id(leaf) in known else Pretended(leaf, device)

    return tree_map(wrapped, found)
