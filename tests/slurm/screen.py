"""A terminal with a command on it, as a person sees it."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import termios
import threading
from collections.abc import Mapping, Sequence

_LINES, _LETTERS = 24, 160
_HOME, _ESCAPES = "\x1b[H", re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_PIECE_BYTES = 1 << 16


class Screen(threading.Thread):
    """Shows what a command draws, until it is left by Ctrl-C."""

    def __init__(self, words: Sequence[str], environment: Mapping[str, str]) -> None:
        super().__init__(daemon=True)
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", _LINES, _LETTERS, 0, 0))
        sized = dict(environment) | {"COLUMNS": str(_LETTERS), "LINES": str(_LINES), "TERM": "xterm"}
        self._process = subprocess.Popen(words, stdin=theirs, stdout=theirs, stderr=theirs, env=sized)
        os.close(theirs)
        self._drawn = ""
        self.start()

    def run(self) -> None:
        # Reading fails once nobody has the other end open.
        while piece := self._read():
            self._drawn += piece.decode(errors="replace")

    def _read(self) -> bytes:
        try:
            return os.read(self._ours, _PIECE_BYTES)
        except OSError:
            return b""

    def lines(self) -> list[str]:
        """The last picture that is whole."""
        *_, whole, _ = ["", "", *self._drawn.split(_HOME)]
        return _ESCAPES.sub("", whole).splitlines()

    def leave(self) -> int:
        """Its exit code after Ctrl-C."""
        self._process.send_signal(signal.SIGINT)
        code = self._process.wait(timeout=60)
        self.join(timeout=60)
        os.close(self._ours)
        return code
