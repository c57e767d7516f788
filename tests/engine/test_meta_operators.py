"""Operators remembered on the meta device: the same shapes and memory as torch finds each time."""

from functools import cache

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from piip_scale.engine.meta_operators import MetaOperators

ATEN = torch.ops.aten


class Remembered(TorchDispatchMode):
    """Counts calls that torch itself answered."""

    def __init__(self):
        super().__init__()
        self.operators, self.computed, self._counted = MetaOperators(), 0, cache(self._counting)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.operators.call(self._counted(func), args, kwargs or {})

    def _counting(self, func):
        def called(*args, **kwargs):
            self.computed += 1
            return func(*args, **kwargs)

        called._schema = func._schema
        return called


def described(tensor):
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.untyped_storage().nbytes()


def block(x, weight):
    y = functional.layer_norm(x, x.shape[-1:])
    y = functional.gelu(y @ weight).transpose(1, 2)
    values, places = y.topk(2, dim=1)
    return [y, values, places, y.sum(dtype=torch.float64), y.to(torch.bfloat16), *y.split(3, 2)]


def test_blocks_of_one_shape_are_computed_once_and_are_what_torch_finds():
    with torch.device("meta"):
        x, weight = torch.empty(2, 7, 8), torch.empty(8, 6)
    plain = [described(tensor) for tensor in block(x, weight)]
    with Remembered() as mode:
        first = [described(tensor) for tensor in block(x, weight)]
        once = mode.computed
        again = block(x, weight)
    assert plain == first == [described(tensor) for tensor in again]
    # Views are asked for each time, since they share an argument's memory.
    views = mode.computed - once
    assert 0 < views < once / 2
    assert len({tensor.untyped_storage()._cdata for tensor in again[:5]}) == 5
    assert again[5].untyped_storage()._cdata == again[0].untyped_storage()._cdata


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((torch.float32, (4, 6), 2), (torch.bfloat16, (4, 6), 2)),
        ((torch.float32, (4, 6), 2), (torch.float32, (6, 4), 2)),
        ((torch.int64, (4, 6), 2), (torch.int64, (4, 6), 2.0)),
        ((torch.int64, (4, 6), 1), (torch.int64, (4, 6), True)),
    ],
)
def test_arguments_of_another_kind_are_another_call(one, other):
    operators = MetaOperators()
    for dtype, size, number in (one, other, one):
        x = torch.empty(size, dtype=dtype, device="meta")
        found = operators.call(ATEN.mul.Tensor, (x, number), {})
        assert described(found) == described(ATEN.mul.Tensor(x, number))


def test_values_are_computed_each_time():
    operators = MetaOperators()
    for value in (2.0, 3.0):
        assert operators.call(ATEN.mul.Tensor, (torch.tensor(value), 2), {}).item() == 2 * value
    x = torch.empty(3, device="meta")
    assert operators.call(ATEN.mul_.Tensor, (x, 2), {}) is x
