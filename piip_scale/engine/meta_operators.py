"""What operators give on the meta device, found once for each kind of arguments."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

_META = torch.device("meta")


@dataclass(frozen=True)
class _Shape:
    """All that there is of a tensor on the meta device."""

    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> _Shape:
        return cls(tensor.shape, tensor.stride(), tensor.dtype)

    def new(self) -> Tensor:
        return torch.empty_strided(self.size, self.stride, dtype=self.dtype, device=_META)


@dataclass(frozen=True)
class _Result:
    """What an operator gives; ``None`` stands for what it leaves out."""

    shapes: tuple[_Shape | None, ...]
    is_single: bool

    def new(self) -> Any:
        tensors = tuple(shape and shape.new() for shape in self.shapes)
        return tensors[0] if self.is_single else tensors


class MetaOperators:
    """Calls operators as torch does, but on the meta device each with the same arguments once.

    Torch finds many results there in Python, through a dozen other operators, and a network calls the same ones with
    the same shapes in each of its blocks. What changes or shares an argument is called each time, and so is all that
    takes or gives anything of another device, which has values.
    """

    def __init__(self) -> None:
        self._known: dict[Hashable, _Result] = {}

    def call(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What ``func`` gives.

        Args:
            func: An operator as dispatch modes get it.
            args: Of the call.
            kwargs: Likewise.
        """
        if not _makes_new_tensors(func):
            return func(*args, **kwargs)
        key = (func, *_described(args), *_described(kwargs.items()))
        if known := self._known.get(key):
            return known.new()
        result = func(*args, **kwargs)
        if _is_new(result, (args, kwargs)):
            parts = (result,) if isinstance(result, Tensor) else result
            shapes = tuple(None if part is None else _Shape.of(part) for part in parts)
            self._known[key] = _Result(shapes, isinstance(result, Tensor))
        return result


@cache
def _makes_new_tensors(func: Any) -> bool:
    schema = func._schema
    return not any(each.alias_info for each in (*schema.arguments, *schema.returns))


def _described(values: Any) -> Iterator[Any]:
    """All that a result's shape can depend on; kinds too, since 1, 1.0 and True are equal."""
    for value in values:
        if isinstance(value, Tensor):
            yield from (value.shape, value.stride(), value.dtype, value.device)
        elif isinstance(value, list | tuple):
            yield (*_described(value),)
        else:
            yield type(value)
            yield value


def _is_new(result: Any, given: Any) -> bool:
    """Whether a result is nothing but tensors on the meta device, each with a memory that is its own and no larger."""
    made = [each for each in (result if isinstance(result, tuple) else (result,)) if each is not None]
    taken = [each for each in tree_leaves(given) if isinstance(each, Tensor)]
    if not made or not all(isinstance(each, Tensor) and each.device == _META for each in (*made, *taken)):
        return False
    places, others = ({each.untyped_storage()._cdata for each in tensors} for tensors in (made, taken))
    if len(places - others) < len(made):
        return False
    return all(each.untyped_storage().nbytes() == _Shape.of(each).new().untyped_storage().nbytes() for each in made)
