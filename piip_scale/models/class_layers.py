"""Which tensors of a model have a size that follows from the number of classes, found without knowing their names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ClassLayer:
    """A tensor of which one size is ``each * classes + others``.

    Attributes:
        axis: Where that size is.
        each: What a class adds to it.
        others: What is there without classes, such as a background's row.
    """

    axis: int
    each: int
    others: int

    def num_classes(self, shape: Sequence[int]) -> int | None:
        """The classes of a tensor of this shape; ``None`` where it is no such tensor's."""
        if self.axis >= len(shape):
            return None
        number, rest = divmod(shape[self.axis] - self.others, self.each)
        return None if rest or number < 1 else number


SOME_CLASSES = (3, 4)
"""Two numbers of classes to compare a model's shapes with; two classes are a case of their own to mmseg."""


def class_layers(fewer: Mapping[str, Tensor], more: Mapping[str, Tensor]) -> dict[str, ClassLayer]:
    """The class layers of a model, by name.

    Args:
        fewer: Its state dict with the first number of ``SOME_CLASSES``, on any device.
        more: With the second.
    """
    found = {}
    for name, tensor in fewer.items():
        sizes = list(zip(tensor.shape, more[name].shape, strict=True))
        differing = [axis for axis, (first, second) in enumerate(sizes) if first != second]
        if differing:
            (axis,) = differing
            each = (sizes[axis][1] - sizes[axis][0]) // (SOME_CLASSES[1] - SOME_CLASSES[0])
            found[name] = ClassLayer(axis, each, sizes[axis][0] - SOME_CLASSES[0] * each)
    return found


def num_classes_of(layers: Mapping[str, ClassLayer], shapes: Mapping[str, Sequence[int]]) -> int | None:
    """The number of classes that tensors of these shapes were made for; ``None`` where they do not agree on one."""
    numbers = {layer.num_classes(shapes[name]) for name, layer in layers.items() if name in shapes}
    return numbers.pop() if len(numbers) == 1 else None
