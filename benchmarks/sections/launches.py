"""Kernels that the parts of PIIP-H6B start and the bytes these move, forward and backward, plain and fused.

Counted on the meta device at the real size of one image: nothing is computed. An operator of torch counts as one
kernel that reads its inputs and writes its outputs once, a product too; views and allocations count as none. What
libraries start beside that on a GPU (workspaces, copies to the layout a kernel wants) is not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from piip_scale.config.branches import VitBranchConfig
from piip_scale.config.interaction import InteractionConfig
from piip_scale.config.model import Kernels
from piip_scale.config.presets import expand_preset
from piip_scale.config.pyramid import PyramidConfig
from piip_scale.engine.rehearsal import FusedOnGpu
from piip_scale.models.branch import FeatureSpec
from piip_scale.models.interaction import InteractionUnit
from piip_scale.models.merging import Merging
from piip_scale.models.pyramid import Pyramid
from piip_scale.models.vit import Block
from piip_scale.ops import fused
from sections.record import table

Run = Callable[[], Sequence[Tensor]]
Builder = Callable[[Kernels], tuple[nn.Module, Run]]

_MB = 1e6
_DROP_PATH_RATE = 0.4
_LARGE, _SMALL = (32, 3200), (64, 1280)
"""Cells of a side and width: InternViT-6B at 512 px, ViT-H at 1,024."""


@dataclass
class Traffic:
    """Kernels started, and bytes they read and write."""

    kernels: int = 0
    num_bytes: int = 0

    def add(self, values: Any) -> None:
        """One kernel more, of which these are inputs and outputs."""
        self.kernels += 1
        self.num_bytes += sum(leaf.nbytes for leaf in tree_leaves(values) if isinstance(leaf, Tensor))


def section() -> str:
    """The table for every part, plain and fused."""
    rows = []
    for name, build in PARTS.items():
        found = [count(*build(Kernels("sdpa", "triton", kernel))) for kernel in ("plain", "triton")]
        cells = [f"{a.kernels:,} / {b.kernels:,}" for a, b in zip(*found, strict=True)]
        cells += [f"{a.num_bytes / _MB:,.0f} / {b.num_bytes / _MB:,.0f}" for a, b in zip(*found, strict=True)]
        rows.append([name, *cells])
    head = ["plain / fused", "kernels forward", "backward", "MB forward", "MB backward"]
    return f"{' '.join((__doc__ or '').split())}\n\n{table(head, rows)}"


def count(module: nn.Module, run: Run) -> tuple[Traffic, Traffic]:
    """Traffic of a module's forward and backward pass on the meta device."""
    forward, backward = Traffic(), Traffic()
    run()  # what is made once for a size
    with FusedOnGpu(active=True), _counted(forward):
        outputs = run()
    gradients = tuple(torch.empty_like(output) for output in outputs)
    with FusedOnGpu(active=True), _counted(backward):
        # ``backward`` itself would put the mode aside.
        _engine_run_backward(outputs, gradients, False, False, (), allow_unreachable=True, accumulate_grad=True)
    return forward, backward


@contextmanager
def _counted(traffic: Traffic) -> Iterator[None]:
    def launch(_kernel: object, _grid: object, *arguments: object, **_constants: object) -> None:
        traffic.add(arguments)

    with patch.object(fused, "launch", launch), _ChannelsLast(), _Operators(traffic):
        yield


class _ChannelsLast(TorchFunctionMode):
    """Has convolutions return maps whose channels lie together where their inputs' do, as on a GPU."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not torch.conv2d:
            return func(*args, **(kwargs or {}))
        output = func(*args, **(kwargs or {}))
        together = args[0].is_contiguous(memory_format=torch.channels_last)
        return _Together.apply(output) if together else output


class _Together(torch.autograd.Function):
    """A map's layout changed without a kernel: there are no values."""

    @staticmethod
    def forward(_ctx: object, map_BCHW: Tensor) -> Tensor:
        return torch.empty_like(map_BCHW, memory_format=torch.channels_last)

    @staticmethod
    def backward(_ctx: object, grad_BCHW: Tensor) -> Tensor:
        return grad_BCHW


class _Operators(TorchDispatchMode):
    def __init__(self, traffic: Traffic) -> None:
        super().__init__()
        self._traffic = traffic

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and not _moves_nothing(func):
            self._traffic.add((args, kwargs, result))
        return result


def _moves_nothing(func: Any) -> bool:
    return func._schema.name.removeprefix("aten::") in {
        "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach", "_unsafe_view",
    }  # fmt: skip


def _built(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build().to(torch.bfloat16).train()


def _grid(side: int, width: int) -> Tensor:
    return torch.empty(1, side, side, width, device="meta", dtype=torch.bfloat16, requires_grad=True)


def _block(preset: str, side: int) -> Builder:
    def build(kernels: Kernels) -> tuple[nn.Module, Run]:
        numbers = {"preset": preset, "resolution_px": 224, "drop_path_rate": _DROP_PATH_RATE}
        config = VitBranchConfig.model_validate(expand_preset(numbers))
        block, grid = _built(lambda: Block(config, 1, kernels)), _grid(side, config.embed_dim)
        return block, lambda: (block(grid.flatten(1, 2), side, side),)

    return build


def _unit(kernels: Kernels) -> tuple[nn.Module, Run]:
    config = InteractionConfig(num_stages=12, drop_path_rate=_DROP_PATH_RATE)
    unit = _built(lambda: InteractionUnit(config, _LARGE[1], _SMALL[1], kernels))
    grids = _grid(*_LARGE), _grid(*_SMALL)
    return unit, lambda: unit(*grids)


def _merging(kernels: Kernels) -> tuple[nn.Module, Run]:
    merging = _built(lambda: Merging((_LARGE[1], _SMALL[1]), "simple", kernels.fused))
    grids = _grid(*_LARGE), _grid(*_SMALL)
    return merging, lambda: (merging(*grids),)


def _pyramid(kernels: Kernels) -> tuple[nn.Module, Run]:
    config = PyramidConfig()
    sources = [FeatureSpec(_LARGE[1], 16)] * len(config.scales)
    pyramid = _built(lambda: Pyramid(config, sources, kernels.fused))
    merged = _grid(_SMALL[0], _LARGE[1]).detach().float().requires_grad_()
    return pyramid, lambda: pyramid(*[merged.permute(0, 3, 1, 2)] * len(config.scales))


PARTS: dict[str, Builder] = {
    "block of InternViT-6B": _block("internvit_6b", _LARGE[0]),
    "block of ViT-H": _block("mae_huge", _SMALL[0]),
    "interaction unit": _unit,
    "merging": _merging,
    "pyramid": _pyramid,
}
