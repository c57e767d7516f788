"""Sections in processes of their own, each with a deadline; every row is kept the moment it comes."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from sections.gpu import SECTIONS
from sections.gpu.jobs import BROKEN_DEVICE, ROW, Values
from sections.record import table

_GRACE_S = 10.0
"""What a job may go on after its section's time before it is ended; a cold process needs some for its imports."""


class Record:
    """The rows of a measurement: ``gpu.jsonl`` as they come, and ``gpu.md`` to read.

    Args:
        folder: Where both lie; what is there already stays, and is not measured again.
        rehearse: The rows are no measurement, and the page says so.
    """

    def __init__(self, folder: Path, *, rehearse: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._lines, self._page, self.rehearse = folder / "gpu.jsonl", folder / "gpu.md", rehearse
        self.rows: list[dict[str, object]] = []
        if self._lines.exists():
            self.rows = [json.loads(line) for line in self._lines.read_text(encoding="utf-8").splitlines()]

    def done(self, section: str) -> set[str]:
        """Names of a section's rows."""
        return {str(row["name"]) for row in self.rows if row["section"] == section}

    def add(self, section: str, name: str, values: Values) -> None:
        """Keeps one row, whatever happens next."""
        row: dict[str, object] = {"section": section, "name": name, **values}
        self.rows.append(row)
        with self._lines.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self._page.write_text(self._markdown(), encoding="utf-8")

    def _markdown(self) -> str:
        title = "# One GPU" + ", rehearsed: no figure means anything" * self.rehearse
        parts = [title]
        for key, section in SECTIONS.items():
            rows = [row for row in self.rows if row["section"] == key]
            if rows:
                parts.append(f"## {section.title}\n\n{_tables(rows)}")
        return "\n\n".join(parts) + "\n"


def run_sections(record: Record, names: list[str], seconds: float, show: Callable[[str], None]) -> None:
    """Runs sections in order, each in a process of its own, until all are done or the time is out.

    Args:
        record: Keeps the rows.
        names: The sections.
        seconds: For all of them.
        show: Is given a line for every row, and whatever else sections print.
    """
    end = time.monotonic() + seconds
    for name in names:
        left = end - time.monotonic()
        if left < 1:
            show(f"{name}: no time is left")
            continue
        limit = min(left, SECTIONS[name].wanted_s)
        until = time.monotonic() + limit
        while time.monotonic() < until and _run_section(record, name, until - time.monotonic(), show):
            show(f"{name}: the device took no more work; a new process does the rest")


def _run_section(record: Record, name: str, seconds: float, show: Callable[[str], None]) -> bool:
    """Whether the section's process left because its device is broken."""
    command = _command(record, name, seconds)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    timer = threading.Timer(seconds + _GRACE_S, process.kill)
    timer.start()
    try:
        for line in process.stdout or ():
            for row_name, values in _row(line):
                record.add(name, row_name, values)
                show(f"{name}: {row_name}: " + ", ".join(f"{key} {_cell(value)}" for key, value in values.items()))
            if not line.startswith(ROW):
                show(f"    {line.rstrip()}")
    finally:
        timer.cancel()
        process.kill()
    code = process.wait()
    if code not in (0, BROKEN_DEVICE):
        show(f"{name}: its process ended with {code}" + " (out of time)" * (code == -9))
    return code == BROKEN_DEVICE


def _command(record: Record, name: str, seconds: float) -> list[str]:
    script = str(Path(__file__).parents[2] / "gpu.py")
    command = [sys.executable, script, "--child", name, "--seconds", f"{seconds:.1f}"]
    return [*command, "--done", json.dumps(sorted(record.done(name))), *(["--rehearse"] * record.rehearse)]


def _row(line: str) -> Iterator[tuple[str, Values]]:
    if line.startswith(ROW):
        values = json.loads(line.removeprefix(ROW))
        yield values.pop("name"), values


def _tables(rows: list[dict[str, object]]) -> str:
    """Rows of the same columns share a table."""
    tables: dict[tuple[str, ...], list[dict[str, object]]] = {}
    for row in rows:
        columns = tuple(key for key in row if key not in ("section", "name"))
        tables.setdefault(columns, []).append(row)
    return "\n\n".join(
        table(["", *columns], [[row["name"], *(_cell(row[key]) for key in columns)] for row in of_columns])
        for columns, of_columns in tables.items()
    )


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return "; ".join(map(str, value))
    return str(value).replace("|", "/")
