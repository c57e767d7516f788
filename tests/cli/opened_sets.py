"""What opening sets asks of the disk that they are on, and which processes did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

Operations = Counter[tuple[str, str]]
"""How often something was done to a file, by what and the file."""


def opening(sets: Iterable[Path]) -> Operations:
    """Opens each once: looks at the manifest and reads it, looks at each shard and reads its index."""
    files = [file for folder in sets for file in (folder / "manifest.json", *folder.glob("*.index.json"))]
    looks = [file for folder in sets for file in (folder / "manifest.json", *folder.glob("*.tar"))]
    return Counter([*(("open", str(file)) for file in files), *(("stat", str(file)) for file in looks)])


def assert_opened_once(by_process: Iterable[Operations], sets: Iterable[Path], num_processes: int) -> None:
    """So many have opened the sets, each once; others, which load for them, did nothing but read samples."""
    asked = [Counter({key: n for key, n in counts.items() if not _reads_samples(*key)}) for counts in by_process]
    assert [counts for counts in asked if counts] == [opening(sets)] * num_processes


def assert_found_once(operations: Operations, sets: Iterable[Path]) -> None:
    """One process has opened the sets, each once, after looking whether they are there."""
    read = {key: n for key, n in operations.items() if key[0] == "open" and not _reads_samples(*key)}
    assert read == {key: n for key, n in opening(sets).items() if key[0] == "open"}


def _reads_samples(what: str, name: str) -> bool:
    return what == "open" and name.endswith(".tar")
