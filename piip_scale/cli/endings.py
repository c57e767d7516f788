"""How a command ends: silently, or with one line that names what is wrong."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from piip_scale.errors import Interrupted, PiipError, WorldError
from piip_scale.world import read_world

COMMAND = "piip-scale"
"""What its lines begin with."""

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
        if isinstance(getattr(end.__context__, "__cause__", None), KeyboardInterrupt):
            _say_interrupted(name)
        raise
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        where = f": {error.filename}" if error.filename else ""
        line = f"{os.strerror(error.errno or 0)}{where}; free space or choose a writable place, then run again"
        _fail(name, line, 1)


@contextmanager
def ended_at_once() -> Iterator[None]:
    """Has a Ctrl-C end this process where it stands, with its line: for imports, before there is anything to put away.

    Python's own exception would come out of what is being imported, changed by it at times, or abort it where that is
    C++. Whoever takes the signal over inside keeps it. Nothing in another thread than the main one.
    """
    is_main = threading.current_thread() is threading.main_thread()
    # Not where the shell has it ignored, as for what it starts behind its back.
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, _end_at_once)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is _end_at_once:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _end_at_once(*_: object) -> NoReturn:
    _say_interrupted(COMMAND)
    sys.stderr.flush()
    os._exit(Interrupted.exit_code)


def _say_interrupted(name: str) -> None:
    """One of many ranks says it."""
    try:
        speaks = read_world().is_main
    except WorldError:
        speaks = True
    if speaks:
        print(f"{name}: stopped by Ctrl-C before it was done", file=sys.stderr)


def _fail(name: str, line: str, exit_code: int) -> NoReturn:
    print(f"{name}: error: {line}", file=sys.stderr)
    raise SystemExit(exit_code)
