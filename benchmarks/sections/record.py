"""Tables as Markdown, and the file that keeps them."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch
import typer

from piip_scale.files import write_text_atomically


def measure(
    sections: Mapping[str, Callable[[], str]], names: Sequence[str] | None, script: Path, record: Path | None
) -> None:
    """Runs sections and prints their Markdown; every one says when, where and with what it was measured.

    Args:
        sections: By name; each returns its Markdown, without its heading.
        names: Those to run; all where none is named.
        script: The command to run them again.
        record: The file whose sections of the same names are replaced.

    Raises:
        typer.BadParameter: There is no section of a name.
    """
    unknown = sorted(set(names or ()) - sections.keys())
    if unknown:
        raise typer.BadParameter(f"no section {unknown[0]!r}; there are {', '.join(sections)}")
    for name in names or sections:
        text = f"{sections[name]().strip()}\n\n{provenance(name, script)}"
        typer.echo(f"## {name}\n\n{text}\n")
        sys.stdout.flush()
        if record is not None:
            write_text_atomically(record, replaced(record.read_text(encoding="utf-8"), name, text))


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table, all but the first column aligned to the right."""
    lines = [_row(header), _row(["---", *["---:"] * (len(header) - 1)])]
    return "\n".join([*lines, *(_row([str(cell) for cell in row]) for row in rows)])


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def provenance(name: str, script: Path) -> str:
    """One line: when, on what and by which command a section was measured."""
    words = f'"{name}"' if " " in name else name
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "deepspeed"))
    return (
        f"*{date.today().isoformat()}; {os.cpu_count()} cores ({platform.machine()}), {gpu}; Python "
        f"{platform.python_version()}, {versions}; `python benchmarks/{script.name} {words} --record`.*"
    )


def replaced(document: str, name: str, text: str) -> str:
    """The document with the section ``## name`` replaced, or added at the end."""
    head, *sections = document.split("\n## ")
    contents = {section.split("\n", 1)[0].strip(): section for section in sections}
    contents[name] = f"{name}\n\n{text.strip()}\n"
    return "\n## ".join([head, *contents.values()]).rstrip("\n") + "\n"
