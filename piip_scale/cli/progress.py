"""A progress bar for commands that go through many files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from piip_scale.cli.plain import escaped

if TYPE_CHECKING:
    from piip_scale.data.packing.packing import Progress


@contextmanager
def progress_bar(title: str) -> Iterator[Progress]:
    """A bar on standard error, nothing where that is no terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task(escaped(title), total=None)

        def show(done: int, total: int) -> None:
            progress.update(bar, completed=done, total=total)

        yield show
