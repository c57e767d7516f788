"""What a network is made of: parts that are gathered once, computed anew as one, and compiled as one."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

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
        if self.checkpointed and self.training and self._has_backward_pass(arguments):
            # The reentrant kind needs an input with a gradient, which a frozen stem does not give.
            return checkpoint(computation, drawn, *arguments, use_reentrant=False, preserve_rng_state=False)
        return computation(drawn, *arguments)

    def replace_computation(self, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Computes by what ``wrap`` makes of ``compute`` from now on."""
        self._computation = wrap(self.compute)

    def _has_backward_pass(self, arguments: Sequence[Any]) -> bool:
        # Lazily: the first argument mostly tells, and to look through a unit's modules takes longer than an operator.
        tensors = itertools.chain(arguments, self.parameters())
        return any(isinstance(tensor, Tensor) and tensor.requires_grad for tensor in tensors)


def units_of(model: nn.Module) -> Iterator[Unit]:
    """Every unit of a model."""
    return (module for module in model.modules() if isinstance(module, Unit))
