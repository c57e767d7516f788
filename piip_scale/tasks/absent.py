"""Imports without what they take along wherever it is installed."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def absent(*names: str) -> Iterator[None]:
    """Inside, these top-level modules are not installed, as far as imports can see; those imported before stay."""
    hidden = [name for name in names if name not in sys.modules]
    for name in hidden:
        # Python's own way of saying that a module is known not to be there.
        sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
