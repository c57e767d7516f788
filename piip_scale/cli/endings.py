"""How a command ends: silently, or with one line that names what is wrong."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from piip_scale.errors import PiipError, WorldError
from piip_scale.world import read_world

_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG}


def in_one_line(command: Callable[[], object], name: str) -> None:
    """Runs a command of typer's; what goes wrong becomes one line on standard error and an exit code.

    Args:
        command: Parses the arguments of this process, and runs.
        name: What the line begins with.
    """
    for stream in (sys.stdout, sys.stderr):
        # Paths may hold bytes that are no text, names letters that a terminal's encoding lacks.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        command()
    except PiipError as error:
        # Of an echo another rank is the one that speaks.
        if error.is_echo:
            raise SystemExit(error.exit_code) from None
        _fail(name, error.line, error.exit_code)
    except SystemExit as end:
        # typer ends a command that Ctrl-C interrupts silently; a training has written its own.
        if isinstance(getattr(end.__context__, "__cause__", None), KeyboardInterrupt) and _speaks():
            print(f"{name}: stopped by Ctrl-C before it was done", file=sys.stderr)
        raise
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        where = f": {error.filename}" if error.filename else ""
        line = f"{os.strerror(error.errno or 0)}{where}; free space or choose a writable place, then run again"
        _fail(name, line, 1)


@contextmanager
def without_traceback() -> Iterator[None]:
    """Has a Ctrl-C end this process as one of the system's own, where there is nothing yet to put away. Main thread."""
    python = signal.getsignal(signal.SIGINT)
    # Not where the shell has it ignored, as for what it starts behind its back.
    if python is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, python)


def _speaks() -> bool:
    """Whether this process says what all ranks could."""
    try:
        return read_world().is_main
    except WorldError:
        return True


def _fail(name: str, line: str, exit_code: int) -> NoReturn:
    print(f"{name}: error: {line}", file=sys.stderr)
    raise SystemExit(exit_code)
