"""How often a training's micro-batch has the host wait for a GPU, counted on a CPU by what torch is asked for."""

from __future__ import annotations

import functools
import traceback
from collections import Counter
from contextlib import ExitStack

import torch
from small_detectors import SMALL, batch_of, instances, run_config
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from piip_scale.tasks.detection.few_waits_dino import HostNumbers
from piip_scale.tasks.detection.model import build_detection_model

aten = torch.ops.aten
SIZED_BY_VALUES = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
    aten.equal.default,
}
"""Operators whose result's size, or whose result, is a number on the host."""
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
TO_HOST = {torch.Tensor.cpu, torch.Tensor.tolist}
SENT = {torch.Tensor.new_tensor, torch.tensor, torch.as_tensor}
"""Python's numbers onto a device: a copy that torch waits for."""
OURS = "piip_scale"
NOT_ON_A_GPU = ("keep.nonzero()", "F.one_hot(", "value_list = value.split(", "value_l_ = value_list[level]")
"""Booleans that stay on the CPU are counted there; the others are mmdet's and mmcv's ways without a CUDA kernel."""


class Waits:
    """Counts while entered, by the code that caused them.

    On a GPU an index by booleans counts them, but where one number is written it fills by a mask.
    """

    def __init__(self) -> None:
        self.sites: Counter[str] = Counter()
        self._stack = ExitStack()

    def __enter__(self) -> Waits:
        self._stack.enter_context(_Operators(self.sites))
        self._stack.enter_context(_Calls(self.sites))
        return self

    def __exit__(self, *error) -> None:
        self._stack.close()

    @property
    def number(self) -> int:
        return self.sites.total()


class _Operators(TorchDispatchMode):
    def __init__(self, sites) -> None:
        super().__init__()
        self._sites = sites

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        on_host = any(isinstance(argument, HostNumbers) for argument in args)
        if (func in SIZED_BY_VALUES and not on_host) or (func in INDEXED and _counts_booleans(args)):
            _note(self._sites, str(func))
        return func(*args, **(kwargs or {}))


class _Calls(TorchFunctionMode):
    def __init__(self, sites) -> None:
        super().__init__()
        self._sites = sites

    def __torch_function__(self, func, types, args=(), kwargs=None):
        # Of a tensor's device, here the CPU as well, but not by that name.
        device = (kwargs or {}).get("device")
        names_device = func is torch.Tensor.new_tensor or (device is not None and not isinstance(device, str))
        if func in TO_HOST or (func in SENT and names_device):
            _note(self._sites, func.__name__)
        return func(*args, **(kwargs or {}))


def _counts_booleans(args) -> bool:
    fills = len(args) > 2 and args[2].numel() == 1
    return not fills and any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])


def _note(sites, what: str) -> None:
    frames = [frame for frame in traceback.extract_stack() if "/torch/" not in frame.filename][:-2]
    # What watches calls inside of them is not who made them.
    frames = [frame for frame in frames if frame.name != "__torch_function__"]
    known = [frame for frame in frames if OURS in frame.filename or "/mm" in frame.filename]
    frame = (known or frames)[-1]
    if not any(line in frame.line for line in NOT_ON_A_GPU):
        sites[f"{what} at {'/'.join(frame.filename.split('/')[-2:])}: {frame.line}"] += 1


@functools.cache
def detector(kind: str):
    """One for all tests: nothing in it changes but its gradients."""
    torch.manual_seed(0)
    return build_detection_model(run_config(kind, overrides=SMALL[kind]), 3).train()


def waits_of(model, num_images: int) -> Waits:
    """Of a micro-batch's forward and backward pass, three objects in each image."""
    boxes = [[10, 12, 60, 70], [70, 30, 150, 120], [64, 64, 100, 110]]
    batch = batch_of(*[instances(boxes, [0, 1, 2]) for _ in range(num_images)])
    torch.manual_seed(0)
    with Waits() as waits:
        losses = model(batch)
        sum(value for name, value in losses.items() if "loss" in name).backward()
    return waits


def main() -> None:
    """Prints how many there are for one, two and four images, and where."""
    for kind in SMALL:
        model = detector(kind)
        found = [waits_of(model, number) for number in (1, 2, 4)]
        print(kind, [waits.number for waits in found])
        for site, number in found[1].sites.most_common():
            print(f"  {number} {site}")


if __name__ == "__main__":
    main()
