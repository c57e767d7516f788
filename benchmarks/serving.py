#!/usr/bin/env python
"""Measures ``piip-scale serve`` under load; ``--record`` puts the Markdown into serving.md."""

from __future__ import annotations

import http.client
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import typer
from sections.record import measure, table

RECORD = Path(__file__).with_suffix(".md")
_DEMO = Path("runs") / "demo"
_PORT, _REQUESTS, _PHOTOS = 8765, 200, 4
_START_SECONDS = 300
_MIB = 1 << 20
_BAD = {"text": b"good morning", "an empty body": b"", "40 MB of zeros": b"\0" * 40_000_000}


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Of Load; all where none is named.")] = None,
    model: Annotated[Path, typer.Option(help="A folder that `piip-scale export` wrote.")] = _DEMO / "exported",
    photos: Annotated[Path, typer.Option(help="A folder of JPEGs, of which some are sent.")] = _DEMO
    / "data"
    / "images",
    record: Annotated[bool, typer.Option(help="Replace the sections in serving.md beside this script.")] = False,
) -> None:
    """Serve a model in a process of its own, ask it, measure and print; by default the demo's, once it is exported."""
    contents = [path.read_bytes() for path in sorted(photos.glob("*.jpg"))[:_PHOTOS]]
    measure({"Load": lambda: _load(str(model), contents)}, names, Path(__file__), RECORD if record else None)


def _load(model: str, photos: Sequence[bytes]) -> str:
    words = ["-m", "piip_scale.cli.main", "serve", model, "--port", str(_PORT), "--queue", "8"]
    server = subprocess.Popen([sys.executable, *words])
    try:
        _wait(server)
        _asked(photos[0])
        rows = [_row(photos, clients) for clients in (1, 4, 8, 32)]
        bad = {"half a JPEG": photos[0][: len(photos[0]) // 2]} | _BAD
        refused = [(name, _timed(content)) for name, content in bad.items()]
        started = time.monotonic()
        server.send_signal(signal.SIGTERM)
        server.wait(60)
        ended = f"SIGTERM ended it in {time.monotonic() - started:.1f} s with code {server.returncode}."
    finally:
        server.kill()
    head = f"{_REQUESTS} requests a row, `--queue 8`, on {os.cpu_count()} cores."
    return "\n\n".join([head, table(_COLUMNS, rows), table(("body", "answer"), refused), ended])


_COLUMNS = ("clients", "answered", "sent away (503)", "answered/s", "median, ms", "95 %, ms", "MiB before", "MiB after")


def _row(photos: Sequence[bytes], clients: int) -> tuple[str, ...]:
    before, started = _memory_mib(), time.monotonic()
    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(lambda n: _asked(photos[n % len(photos)]), range(_REQUESTS)))
    seconds = time.monotonic() - started
    codes = Counter(code for code, _ in answers)
    times = sorted(1000 * taken for code, taken in answers if code == 200)
    late = times[int(0.95 * (len(times) - 1))]
    numbers = (clients, codes[200], codes[503])
    measured = (f"{codes[200] / seconds:.1f}", f"{statistics.median(times):.0f}", f"{late:.0f}")
    return (*map(str, numbers), *measured, f"{before:.0f}", f"{_memory_mib():.0f}")


def _timed(content: bytes) -> str:
    try:
        code, seconds = _asked(content)
    except OSError:
        # The server answers and hangs up before it has read what is too large.
        return "refused and hung up"
    return f"{code} in {1000 * seconds:.0f} ms"


def _asked(content: bytes) -> tuple[int, float]:
    started = time.monotonic()
    code, _ = _answer("POST", "/predict", content)
    return code, time.monotonic() - started


def _answer(method: str, path: str, content: bytes | None = None) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", _PORT, timeout=120)
    try:
        connection.request(method, path, content)
        reply = connection.getresponse()
        return reply.status, reply.read().decode()
    finally:
        connection.close()


def _memory_mib() -> float:
    found = re.search(r"^process_resident_memory_bytes (\S+)$", _answer("GET", "/metrics")[1], re.MULTILINE)
    assert found is not None
    return float(found[1]) / _MIB


def _wait(server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while server.poll() is None and time.monotonic() < deadline:
        try:
            _answer("GET", "/health")
        except OSError:
            time.sleep(0.2)
        else:
            return
    raise SystemExit("the server did not start")


if __name__ == "__main__":
    typer.run(main)
