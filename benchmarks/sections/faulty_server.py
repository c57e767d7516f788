"""A file server on this machine that fails as it is told, for tests and measurements."""

from __future__ import annotations

import json
import re
import threading
from collections import Counter
from collections.abc import Callable
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Literal
from urllib.parse import unquote

Fault = Literal["503", "404", "stall", "truncate", "garble", "short"]
"""What a request meets: an error, half of the body and then nothing or an end, wrong bytes, or half a file."""

FaultOf = Callable[[str, int], "Fault | None"]
"""The fault of the n-th request, from 0, for a file."""

COUNTS = ".counts"
"""A GET of it tells how many requests and faults there were, as JSON."""

_PIECE_BYTES = 1 << 18


def no_fault(name: str, number: int) -> Fault | None:
    """A server that works."""
    return None


class FaultyServer:
    """Serves a folder at ``url`` while the context lasts.

    Args:
        folder: What it serves.
        fault_of: How it fails.
        ranges: Knows ``Range``; without, every answer is the whole file.
        seconds_per_piece: Waits so long before each quarter of a megabyte.

    Attributes:
        requests: How many there were, by file.
        faults: How many, by kind.
        num_active: Answers under way.
        most_active: The most there were at once.
    """

    def __init__(
        self, folder: Path, fault_of: FaultOf = no_fault, *, ranges: bool = True, seconds_per_piece: float = 0.0
    ) -> None:
        self.folder, self.fault_of, self.ranges, self.seconds_per_piece = folder, fault_of, ranges, seconds_per_piece
        self.requests: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.num_active = self.most_active = 0
        self.closing = threading.Event()
        self.lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), partial(_Handler, self))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> FaultyServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.closing.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def count(self, name: str) -> Fault | None:
        """Counts a request; returns the fault it is to meet."""
        with self.lock:
            fault = self.fault_of(name, self.requests[name])
            self.requests[name] += 1
            if fault is not None:
                self.faults[fault] += 1
            return fault

    def active(self, change: int) -> None:
        """Counts answers under way."""
        with self.lock:
            self.num_active += change
            self.most_active = max(self.most_active, self.num_active)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that leave early are what tests do."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Else a body waits for the client to acknowledge its headers, which takes it 40 ms.
    disable_nagle_algorithm = True

    def __init__(self, owner: FaultyServer, *arguments: object) -> None:
        self._owner = owner
        super().__init__(*arguments)  # type: ignore[arg-type]

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        """Sends a file, a part of it, or what the fault makes of that."""
        name = unquote(self.path.lstrip("/"))
        if name == COUNTS:
            self._send(200, json.dumps([self._owner.requests, self._owner.faults]).encode())
            return
        fault = self._owner.count(name)
        path = self._owner.folder / name
        if fault in ("503", "404") or not path.is_file():
            self._send(503 if fault == "503" else 404, b"no")
            return
        self._owner.active(1)
        try:
            self._send_file(path.read_bytes(), fault)
        finally:
            self._owner.active(-1)

    def _send_file(self, content: bytes, fault: Fault | None) -> None:
        status = 200
        if fault == "short":
            content = content[: len(content) // 2]
        if (found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))) and self._owner.ranges:
            begin, end = int(found[1]), min(int(found[2] or len(content)) + 1, len(content))
            if begin >= len(content):
                self._send(416, b"")
                return
            status, content = 206, content[begin:end]
        if fault == "garble":
            middle = len(content) // 2
            content = content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]
        self._send(status, content, broken=fault if fault in ("stall", "truncate") else None)

    def _send(self, status: int, content: bytes, broken: Fault | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        sent = content if broken is None else content[: len(content) // 2]
        for begin in range(0, len(sent), _PIECE_BYTES):
            self._owner.closing.wait(self._owner.seconds_per_piece)
            self.wfile.write(sent[begin : begin + _PIECE_BYTES])
        if broken == "stall":
            self._owner.closing.wait()
        self.close_connection = broken is not None
