"""Tables as Markdown, and the file that keeps them."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

RECORD = Path(__file__).parents[1] / "engine.md"


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table, all but the first column aligned to the right."""
    lines = [_row(header), _row(["---", *["---:"] * (len(header) - 1)])]
    return "\n".join([*lines, *(_row([str(cell) for cell in row]) for row in rows)])


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def provenance(name: str) -> str:
    """One line: when, on what and by which command a section was measured."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "deepspeed"))
    return (
        f"*{date.today().isoformat()}; {os.cpu_count()} cores ({platform.machine()}), {gpu}; Python "
        f"{platform.python_version()}, {versions}; `python benchmarks/engine.py {name} --record`.*"
    )


def replaced(document: str, name: str, text: str) -> str:
    """The document with the section ``## name`` replaced, or added at the end."""
    head, *sections = document.split("\n## ")
    contents = {section.split("\n", 1)[0].strip(): section for section in sections}
    contents[name] = f"{name}\n\n{text.strip()}\n"
    return "\n## ".join([head, *contents.values()]).rstrip("\n") + "\n"
