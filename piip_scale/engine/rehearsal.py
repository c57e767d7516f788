"""What a network keeps for its backward pass, found by running it on the meta device: shapes without values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from piip_scale.engine.meta_operators import MetaOperators
from piip_scale.models.saved_activations import AliveBytes

_REST = "rest"
# For all rehearsals: those that a plan compares differ in a few operators only.
_OPERATORS = MetaOperators()


@dataclass(frozen=True)
class Moment:
    """When the gradient of a parameter is whole.

    Attributes:
        numel: Of the parameter; 0 at the end of the backward pass.
        until: The most bytes alive since the moment before, the gradient itself among them.
        after: Bytes alive once the gradient is somebody else's.
    """

    numel: int
    until: int
    after: int


@dataclass(frozen=True)
class Rehearsal:
    """Bytes of activations of one micro-batch, without parameters and their gradients.

    Attributes:
        kept: What the end of the forward pass holds, by the part that made it; the features are the last part's.
        peak: The most that the backward pass holds: what is kept, what is recomputed, and gradients between layers.
        features: The network's output.
        moments: Of the backward pass, one by one.
        operators: That reached torch's dispatcher, views among them: in the forward pass, and in the backward pass.
    """

    kept: Mapping[str, int]
    peak: int
    features: tuple[Tensor, ...]
    moments: tuple[Moment, ...]
    operators: tuple[int, int] = (0, 0)

    @property
    def total_bytes(self) -> int:
        """Of all parts together."""
        return sum(self.kept.values())


def rehearse(
    network: nn.Module, parts: Mapping[str, nn.Module], run: Callable[[], Sequence[Tensor]], *, as_on_gpu: bool = True
) -> Rehearsal:
    """Runs a network forward and backward and counts every byte that is alive.

    Memory is counted as tensors ask for it: no rounding and no fragmentation by an allocator, and no workspaces of
    libraries.

    Args:
        network: In training mode, with parameters in the precision of the run; on the meta device, where this costs
            nothing, or anywhere else.
        parts: Its parts, by name.
        run: Calls the network.
        as_on_gpu: Norms and attention keep what their fused kernels keep on a GPU, not what the meta device's do.
    """
    alive = _Alive(network)
    with _parts_marked(parts, alive), _dropped_gradients(network, alive), FusedOnGpu(as_on_gpu), alive:
        features = tuple(run())
        kept, forward = dict(alive.by_part), alive.operators
        alive.begin_moments()
        shapes = [(feature.shape, feature.dtype) for feature in features]
        losses = tuple(_Heads.apply(feature) for feature in features)
        ones = tuple(torch.ones_like(loss) for loss in losses)
        del features
        before = alive.operators
        # ``backward`` itself would put the modes aside meanwhile.
        _engine_run_backward(losses, ones, False, False, (), allow_unreachable=True, accumulate_grad=True)
        alive.note(0)
    features = tuple(torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in shapes)
    return Rehearsal(kept, alive.most, features, tuple(alive.moments), (forward, alive.operators - before))


class _Heads(torch.autograd.Function):
    """Keeps a feature until its gradient is there, as a neck's convolution does, and nobody keeps it longer."""

    @staticmethod
    def forward(ctx: Any, feature: Tensor) -> Tensor:
        ctx.save_for_backward(feature)
        return feature.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Tensor:
        return torch.empty_like(ctx.saved_tensors[0])


class _Alive(AliveBytes):
    """Knows whose the bytes are, and when there were most."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__((*network.parameters(), *network.buffers()))
        self.part = _REST
        self.by_part: Counter[str] = Counter()
        self.moments: list[Moment] = []
        self._until = self.operators = 0

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.operators += 1
        return _laid_out(func, args, _OPERATORS.call(func, args, kwargs))

    @property
    def making(self) -> str:
        return self.part

    def change(self, num_bytes: int, part: str) -> None:
        super().change(num_bytes, part)
        self.by_part[part] += num_bytes
        self._until = max(self._until, self.now)

    def begin_moments(self) -> None:
        """What was alive before now is no moment's."""
        self._until = self.now

    def note(self, numel: int) -> None:
        """Ends a moment with the gradient of so many elements, which is let go already."""
        self.moments.append(Moment(numel, self._until, self.now))
        self._until = self.now


def _laid_out(func: Any, args: tuple[Any, ...], result: Any) -> Any:
    """The meta device's convolutions forget that channels lie together, and whoever reads rows of them would copy."""
    if func is torch.ops.aten.convolution.default:
        return _like(args[0], result)
    if func is torch.ops.aten.convolution_backward.default and result[0] is not None:
        return (_like(args[1], result[0]), *result[1:])
    return result


def _like(given: Tensor, found: Tensor) -> Tensor:
    together = given.ndim == 4 and given.is_contiguous(memory_format=torch.channels_last)
    return found.contiguous(memory_format=torch.channels_last) if together else found


class FusedOnGpu(TorchFunctionMode):
    """Replaces operators that the meta device would take apart by ones that keep what a GPU's fused kernel keeps."""

    def __init__(self, active: bool) -> None:
        super().__init__()
        self._active = active

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._active and func is functional.scaled_dot_product_attention:
            return _fused_attention(*args, **kwargs)
        if self._active and func is functional.rms_norm:
            return _fused_rms_norm(*args, **kwargs)
        return func(*args, **kwargs)


def _fused_attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """Keeps queries, keys, values, the output and a number for each row, as every fused kernel does."""
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    output: Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, attn_mask, True)[0]
    return output


def _fused_rms_norm(x: Tensor, shape: list[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """Keeps its input and a number for each row; a layer norm keeps one number more."""
    return functional.layer_norm(x, shape, weight, None, eps or torch.finfo(x.dtype).eps)


@contextmanager
def _parts_marked(parts: Mapping[str, nn.Module], alive: _Alive) -> Iterator[None]:
    """Has ``alive`` know whose module is running; parts run by their modules' calls, not by their own."""
    stack: list[str] = []
    handles = []

    def enter(name: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            stack.append(alive.part)
            alive.part = name

        return hook

    def leave(*_: object) -> None:
        alive.part = stack.pop()

    for name, part in parts.items():
        for module in part.modules():
            handles.append(module.register_forward_pre_hook(enter(name)))
            handles.append(module.register_forward_hook(leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _dropped_gradients(network: nn.Module, alive: _Alive) -> Iterator[None]:
    """Lets a parameter's gradient go once it is whole, as ZeRO does; what becomes of it is counted elsewhere."""

    def drop(parameter: Tensor) -> None:
        parameter.grad = None
        alive.note(parameter.numel())

    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    handles = [parameter.register_post_accumulate_grad_hook(drop) for parameter in trained]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
