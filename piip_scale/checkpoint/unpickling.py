"""Reads torch's pickles into descriptions of tensors and plain values, and never runs or imports what they name.

Whatever a pickle asks for by name is answered from the table below, by functions that only describe; any other name is
answered by a class of ours that does nothing, so that a file can be read whole and then refused by what it named.

Source: the pickles that ``torch.save`` of torch 1.12 to 2.15 writes; ``torch._utils`` has what they would call.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from piip_scale.checkpoint.dtypes import DTYPES, UINT8, DType
from piip_scale.checkpoint.stored_tensor import Storage, StoredTensor


class Inert:
    """Stands for an object of which no weight depends; takes what a pickle gives it, and keeps nothing."""

    def __new__(cls, *_: object, **__: object) -> Inert:
        """An object, whatever it is made of."""
        return object.__new__(cls)

    def __init__(self, *_: object, **__: object) -> None:
        return

    def __setstate__(self, state: object) -> None:
        return

    def append(self, item: object) -> None:
        """As of a list."""

    def extend(self, items: object) -> None:
        """As of a list."""

    def __setitem__(self, key: object, value: object) -> None:
        return


class Foreign(Inert):
    """Stands for an object of a class that is not in our table.

    Attributes:
        origin: The class's name: ``argparse.Namespace``.
        is_called: The pickle calls that name, rather than fill a record of its class: it would run code.
    """

    origin = ""
    is_called = False

    def __init__(self, *_: object, **__: object) -> None:
        # A pickle that only makes a record takes __new__ alone.
        type(self).is_called = True


class Fragment:
    """Stands for DeepSpeed's ``fragment_address``: where a rank's flat tensor holds its part of a parameter.

    Attributes:
        start: First element in the flat tensor.
        numel: Elements.
    """

    start: int
    numel: int


class _StorageType:
    """One of torch's typed storages, or an untyped one; ``dtype`` is ``None`` for types that are not read."""

    def __init__(self, dtype: DType | None) -> None:
        self.dtype = dtype


def _tensor(storage: object, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: object) -> object:
    """``torch._utils._rebuild_tensor_v2``."""
    if not isinstance(storage, _Typed):
        return Inert()
    return _checked(storage.storage, storage.dtype, offset, shape, strides)


def _tensor_of_dtype(
    storage: object, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], _grad: object, _hooks: object,
    dtype: object, *_: object,
) -> object:  # fmt: skip
    """``torch._utils._rebuild_tensor_v3``: of a storage that has no type."""
    if not isinstance(storage, _Typed) or not isinstance(dtype, DType):
        return Inert()
    return _checked(storage.storage, dtype, offset, shape, strides)


def _checked(storage: Storage, dtype: DType, offset: int, shape: Iterable[int], strides: Iterable[int]) -> StoredTensor:
    made = StoredTensor(storage, dtype, offset, tuple(shape), tuple(strides))
    if not made.fits():
        raise ValueError(f"a tensor of shape {made.shape} leaves its storage")
    return made


class _Typed:
    def __init__(self, storage: Storage, dtype: DType) -> None:
        self.storage, self.dtype = storage, dtype


def _of_type(rebuild: object, _type: object, arguments: tuple[Any, ...], _state: object) -> object:
    """``torch._tensor._rebuild_from_type_v2``: a tensor with attributes, of which none is a weight's."""
    return rebuild(*arguments) if rebuild in (_tensor, _tensor_of_dtype, _parameter) else Inert()  # type: ignore[operator]


def _parameter(data: object, *_: object) -> object:
    return data


def _record(kind: type, *_: object) -> object:
    """``copyreg._reconstructor``: an object of a class, not yet filled."""
    return object.__new__(kind) if isinstance(kind, type) and issubclass(kind, Inert | Fragment) else Inert()


def _latin(text: str, encoding: str = "latin1") -> bytes:
    """``_codecs.encode``: how protocol 2 writes bytes."""
    if encoding != "latin1":
        raise ValueError(f"bytes encoded as {encoding!r}")
    return text.encode(encoding)


def _size(sizes: Iterable[int] = ()) -> tuple[int, ...]:
    return tuple(sizes)


_NUMPY = (
    "ndarray",
    "dtype",
    *(
        f"{core}.{name}"
        for core in ("core", "_core")
        for name in ("multiarray._reconstruct", "multiarray.scalar", "numeric._frombuffer")
    ),
)
# Ours for each of torch's storages; none for those whose numbers are not read.
_STORAGES = {
    "Double": "float64",
    "Float": "float32",
    "BFloat16": "bfloat16",
    "Half": "float16",
    "Long": "int64",
    "Int": "int32",
    "Short": "int16",
    "Char": "int8",
    "Byte": "uint8",
    "Bool": "bool",
    **dict.fromkeys(("ComplexFloat", "ComplexDouble", "QUInt8", "QInt8", "QInt32"), ""),
}
_INERT = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "builtins.object",
    "builtins.bytearray",
    "torch.device",
    "torch.Tensor",
    "torch.nn.parameter.Parameter",
    "torch.serialization._get_layout",
    "torch._utils._rebuild_sparse_tensor",
    "torch._utils._rebuild_meta_tensor_no_storage",
    "torch._utils._rebuild_qtensor",
    *(f"numpy.{name}" for name in _NUMPY),
)
_TABLE: dict[str, Callable[..., Any] | DType | _StorageType] = {
    "collections.OrderedDict": OrderedDict,
    "builtins.set": set,
    "builtins.complex": complex,
    "_codecs.encode": _latin,
    "copyreg._reconstructor": _record,
    "deepspeed.utils.tensor_fragment.fragment_address": Fragment,
    "deepspeed.runtime.zero.config.ZeroStageEnum": int,
    "torch.Size": _size,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_dtype,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _of_type,
    "torch.storage.UntypedStorage": _StorageType(UINT8),
    **{f"torch.{dtype.name}": dtype for dtype in DTYPES.values()},
    **{f"torch.{kind}Storage": _StorageType(DTYPES.get(name)) for kind, name in _STORAGES.items()},
    **dict.fromkeys(_INERT, Inert),
}


# Not pickle.Unpickler: that one keeps what a pickle numbers in an array, and a number in a file of a few bytes would
# have it fill all memory.
class _Unpickler(pickle._Unpickler):  # type: ignore[name-defined,misc]
    def __init__(self, data: bytes, storage: Callable[[str, int], Storage]) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8", errors="surrogateescape")
        self.foreign: dict[str, type[Foreign]] = {}
        self._storage = storage
        self._typed: dict[str, _Typed] = {}

    def find_class(self, module: str, name: str) -> object:
        origin = f"{module}.{name}".replace("__builtin__.", "builtins.")
        if origin not in _TABLE:
            made = self.foreign.setdefault(origin, type("Foreign", (Foreign,), {"origin": origin}))
            return made
        return _TABLE[origin]

    def persistent_load(self, identity: tuple[Any, ...]) -> object:
        _, kind, key, _location, numel = identity
        if not isinstance(kind, _StorageType) or kind.dtype is None:
            return Inert()
        if key not in self._typed:
            self._typed[key] = _Typed(self._storage(key, numel * kind.dtype.itemsize), kind.dtype)
        return self._typed[key]


def unpickle(data: bytes, storage: Callable[[str, int], Storage]) -> tuple[Any, list[type[Foreign]]]:
    """What a pickle holds: plain values, ``StoredTensor`` and ``Inert``.

    Args:
        data: The pickle.
        storage: Finds a storage by its key, of at least so many bytes.

    Returns:
        The content, and the classes it names that are not ours to know.

    Raises:
        Exception: Any, where it is damaged.
    """
    reader = _Unpickler(data, storage)
    content = reader.load()
    return content, list(reader.foreign.values())


def places(content: object, kind: type[Foreign]) -> list[str]:
    """The keys under which a content holds objects of a class: ``client_state.args``."""
    return sorted({key for key, value in _walk(content) if value is kind or isinstance(value, kind)})


def _walk(content: object) -> Iterator[tuple[str, object]]:
    left, seen = [("", content)], set()
    while left:
        key, value = left.pop()
        if id(value) in seen:
            continue
        yield key, value
        if isinstance(value, dict | list | tuple | set):
            seen.add(id(value))
            pairs = value.items() if isinstance(value, dict) else enumerate(value)
            left += [(f"{key}.{inner}".lstrip("."), held) for inner, held in pairs]
