"""What a network is made of: parts that are gathered once, computed anew as one, and compiled as one."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from piip_scale.ops.residual import Paths


class Unit(nn.Module, ABC):
    """A block of a branch, or an interaction: its parameters, and its children's, are used within its call only.

    So whoever shards parameters gathers a unit's at its call and knows of no module inside, whether or not the unit is
    computed a second time in the backward pass, which happens inside too.

    Args:
        checkpointed: Keep only its arguments for the backward pass. A frozen unit above frozen ones only has no
            backward pass: it keeps nothing.
    """

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self._computation: Callable[..., Any] | None = None
        self._owners: tuple[nn.Module, ...] | None = None

    @abstractmethod
    def draw(self, *arguments: Any) -> tuple[Paths | None, ...]:
        """The random numbers of one call.

        They are drawn outside ``compute``, so that what computes it twice keeps no generators' states, and what
        compiles it draws what the eager one would.

        Args:
            arguments: Of the call.
        """

    @abstractmethod
    def compute(self, drawn: tuple[Paths | None, ...], *arguments: Any) -> Any:
        """The call itself, a function of its arguments, the parameters and ``training`` only."""

    def forward(self, *arguments: Any) -> Any:
        """``compute`` of new random numbers."""
        drawn, computation = self.draw(*arguments), self._computation or self.compute
        if self.checkpointed and self.training and torch.is_grad_enabled():
            trained = self._trained_parameters()
            if trained or _want_gradients(arguments):
                # A program is another one without gradients: it would be built as well, and round otherwise.
                call = _Call(computation, drawn, len(arguments), self._computation is not None)
                return _ComputedAgain.apply(call, *arguments, *trained)
        return computation(drawn, *arguments)

    def replace_computation(self, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Computes by what ``wrap`` makes of ``compute`` from now on."""
        self._computation = wrap(self.compute)

    def _trained_parameters(self) -> list[nn.Parameter]:
        if self._owners is None:
            # To look for them at each call takes longer than an operator.
            self._owners = tuple(module for module in self.modules() if module._parameters)
        own = itertools.chain.from_iterable(module._parameters.values() for module in self._owners)
        return list({id(each): each for each in own if each is not None and each.requires_grad}.values())


@dataclass(frozen=True)
class _Call:
    """What is computed twice.

    Attributes:
        computation: Of ``drawn`` and the arguments.
        drawn: Random numbers.
        num_arguments: How many arguments it has; what follows them are the parameters that it reads and that are
            trained, each once.
        with_gradients: Whether it must find gradients enabled the first time, too.
    """

    computation: Callable[..., Any]
    drawn: tuple[Paths | None, ...]
    num_arguments: int
    with_gradients: bool


class _ComputedAgain(torch.autograd.Function):
    """A call of which the backward pass keeps the arguments only, and computes it anew.

    Instead of ``torch.utils.checkpoint``. That calls Python for each tensor kept, in both passes, 3,068 times a
    micro-batch of PIIP-H6B; in its reentrant form it needs an input with a gradient, which a frozen stem does not give,
    and hides parameters from whoever hooks their gradients. Here they are inputs like any other.
    """

    @staticmethod
    def forward(ctx: Any, call: _Call, *inputs: Any) -> Any:
        arguments = inputs[: call.num_arguments]
        ctx.call, ctx.parameters = call, inputs[call.num_arguments :]
        ctx.places = [place for place, argument in enumerate(arguments) if isinstance(argument, Tensor)]
        ctx.others = [None if isinstance(argument, Tensor) else argument for argument in arguments]
        ctx.save_for_backward(*(arguments[place] for place in ctx.places))
        if not call.with_gradients:
            return call.computation(call.drawn, *arguments)
        with torch.enable_grad():
            result = call.computation(call.drawn, *_as_leaves(arguments, ctx.needs_input_grad[1:]))
        return result.detach() if isinstance(result, Tensor) else tuple(part.detach() for part in result)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        call, needed = ctx.call, ctx.needs_input_grad[1:]
        arguments = list(ctx.others)
        for place, kept in zip(ctx.places, ctx.saved_tensors, strict=True):
            arguments[place] = kept
        arguments = _as_leaves(arguments, needed)
        with torch.enable_grad():
            result = call.computation(call.drawn, *arguments)
        parts = zip((result,) if isinstance(result, Tensor) else result, gradients, strict=True)
        results, given = zip(*((part, gradient) for part, gradient in parts if part.requires_grad), strict=True)
        inputs = [source for source, wanted in zip((*arguments, *ctx.parameters), needed, strict=True) if wanted]
        # Zeros for what an unused result leaves without: who hooks a parameter is called, and asks for its gradient.
        found = iter(torch.autograd.grad(results, inputs, given, materialize_grads=True))
        return None, *(next(found) if wanted else None for wanted in needed)


def _as_leaves(arguments: Sequence[Any], wanted: Sequence[bool]) -> list[Any]:
    """Arguments from which a graph begins, those that a gradient is wanted of among them."""
    return [
        argument.detach().requires_grad_(gradient) if isinstance(argument, Tensor) else argument
        for argument, gradient in zip(arguments, wanted, strict=False)
    ]


def _want_gradients(arguments: Sequence[Any]) -> bool:
    return any(isinstance(argument, Tensor) and argument.requires_grad for argument in arguments)


def units_of(model: nn.Module) -> Iterator[Unit]:
    """Every unit of a model."""
    return (module for module in model.modules() if isinstance(module, Unit))
