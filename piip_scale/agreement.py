"""Agreement between ranks: their values, what rank 0 answers for, and errors that one of them alone met."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, TypeVar

import torch.distributed as dist

from piip_scale.errors import PiipError, RunError

_Value = TypeVar("_Value")

_apart = ContextVar("apart", default=False)


def is_distributed() -> bool:
    """Whether there are other ranks, and this one works with them."""
    return not _apart.get() and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Inside, this rank works for itself: others may have more to do, or less, and are asked for nothing."""
    token = _apart.set(True)
    try:
        yield
    finally:
        _apart.reset(token)


def is_main_rank() -> bool:
    """Whether this is rank 0, or alone."""
    return not is_distributed() or dist.get_rank() == 0


def gathered(value: _Value) -> list[_Value]:
    """Every rank's value, in the order of the ranks. Collective."""
    if not is_distributed():
        return [value]
    values: list[_Value | None] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]  # each place is filled


def gathered_on_main(value: _Value) -> list[_Value]:
    """Every rank's value, in the order of the ranks, on rank 0 alone; elsewhere nothing. Collective."""
    if not is_distributed():
        return [value]
    values: list[_Value | None] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, values, dst=0)
    return values or []  # type: ignore[return-value]  # each place is filled


def on_main(function: Callable[[], _Value]) -> _Value:
    """Runs a function on rank 0 and gives every rank its result, or its error. Collective.

    Args:
        function: Returns something small that pickles.

    Raises:
        PiipError: What the function raised on rank 0, the same on every rank, so that nobody waits for the others. An
            error of another type is raised on rank 0 as it is, and as a ``RunError`` on the others.
    """
    fault = LocalFault()
    results: list[_Value] = []
    with fault.caught():
        if is_main_rank():
            results.append(function())
    box: list[Any] = [results[0] if results else None, fault.to_send]
    if is_distributed():
        dist.broadcast_object_list(box, src=0)
    fault.raise_any([box[1]])
    result: _Value = box[0]
    return result


class LocalFault:
    """The error that this rank met between two collectives: kept until the others are there to hear of it.

    A rank that raised at once would leave the others waiting in a collective that it never joins.
    """

    def __init__(self) -> None:
        self._error: Exception | None = None

    def __bool__(self) -> bool:
        return self._error is not None

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        """Keeps an error of the block; of several the first."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - of any kind, since none may part the ranks
            self._error = self._error or error

    @property
    def to_send(self) -> PiipError | None:
        """What other ranks are to raise."""
        if self._error is None or isinstance(self._error, PiipError):
            return self._error
        rank = dist.get_rank() if is_distributed() else 0
        return RunError(f"rank {rank}: {type(self._error).__name__}: {self._error}")

    def raise_together(self) -> None:
        """Raises where any rank has an error: its own where this one has, else the lowest rank's. Collective.

        Raises:
            Exception: This rank's error, as it was.
            PiipError: Another's, marked as an echo.
        """
        self.raise_any(gathered(self.to_send))

    def raise_once(self) -> None:
        """As ``raise_together``, but where several ranks have errors of their own, the lowest reports its. Collective.

        Raises:
            Exception: This rank's error, as it was, where it is the lowest that has one.
            PiipError: Another's, marked as an echo.
        """
        everyones = gathered(self.to_send)
        first = next((rank for rank, error in enumerate(everyones) if error is not None), None)
        if first is not None and is_distributed() and first != dist.get_rank():
            self._error = None
        self.raise_any(everyones)

    def raise_any(self, everyones: list[PiipError | None]) -> None:
        """Raises this rank's error, or the first of others'."""
        if self._error is not None:
            raise self._error
        for error in everyones:
            if error is not None:
                error.is_echo = True
                raise error
