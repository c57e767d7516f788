"""What of a conversion is done, a line a tensor: after a kill the next one goes on from there.

No line is believed: a tensor is taken over once what the file holds of it has the checksum that its line says.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from piip_scale.checkpoint.copying import Copied, Job, num_workers, read_of

_CHUNK_BYTES = 1 << 20


def identity_of(jobs: Iterable[Job], *facts: object) -> str:
    """What two conversions share that write the same bytes, as a hash.

    Args:
        jobs: All tensors: their files count with sizes and times, as their names, shapes and dtypes do.
        facts: Whatever else decides what is written.

    Raises:
        OSError: A file is gone.
    """
    described: list[object] = list(map(str, facts))
    paths: set[Path] = set()
    for job in jobs:
        described.append((job.entry.name, job.entry.shape, job.entry.dtype.code))
        paths |= {part.tensor(job.weight.dtype).storage.path for part in job.weight.parts}
    for path in sorted(paths):
        known = path.stat()
        described.append((str(path.absolute()), known.st_size, known.st_mtime_ns))
    return hashlib.sha256(repr(described).encode("utf-8", "surrogateescape")).hexdigest()


class Journal:
    """The file of one conversion under way. The conversion holds a lock of its own.

    Args:
        path: The file.
        identity: Of the conversion, by ``identity_of``.

    Raises:
        OSError: The disk refuses; so do all methods.
    """

    def __init__(self, path: Path, identity: str) -> None:
        self.path = path
        self._done = _lines(path, identity)
        if not self._done:
            path.write_text(json.dumps({"conversion": identity}) + "\n", encoding="utf-8")
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND)

    @property
    def goes_on(self) -> bool:
        """Whether a conversion of the same was killed."""
        return bool(self._done)

    def add(self, job: Job, copied: Copied) -> None:
        """Notes a tensor that is written. Not one with additions, whose parts were read for several."""
        if job.weight.addition is None:
            crcs = [read.crc32 for read in copied.reads]
            line = {"name": copied.entry.name, "crc32": copied.crc32, "reads": crcs}
            os.write(self._file, f"{json.dumps(line)}\n".encode())

    def taken(self, file: Path, jobs: Sequence[Job], starts: Mapping[str, int]) -> list[Copied]:
        """The tensors that a file holds as they were noted, each read and compared.

        Args:
            file: What the killed conversion left.
            jobs: Its tensors.
            starts: The first byte of each in the file.
        """
        noted = [job for job in jobs if job.entry.name in self._done]
        if not noted or not file.exists():
            return []
        opened = os.open(file, os.O_RDONLY)
        try:
            with ThreadPoolExecutor(num_workers(len(noted))) as pool:
                found = pool.map(lambda job: _crc_of(opened, starts[job.entry.name], job.entry.num_bytes), noted)
                held = [
                    job for job, crc in zip(noted, found, strict=True) if crc == self._done[job.entry.name]["crc32"]
                ]
        finally:
            os.close(opened)
        return [self._copied(job) for job in held]

    def close(self) -> None:
        """Lets the file go."""
        os.close(self._file)

    def _copied(self, job: Job) -> Copied:
        line = self._done[job.entry.name]
        pairs = zip(job.weight.parts, line["reads"], strict=True)
        reads = tuple(
            read_of(part.tensor(job.weight.dtype), part.slice.start, part.slice.length, crc) for part, crc in pairs
        )
        return Copied(job.entry, line["crc32"], reads)


def _lines(path: Path, identity: str) -> dict[str, dict[str, Any]]:
    """What a journal of the same conversion notes, by tensor; nothing of another's."""
    try:
        head, *lines = path.read_text(encoding="utf-8").splitlines()
        if json.loads(head) != {"conversion": identity}:
            return {}
    except (OSError, ValueError):
        return {}
    noted = {}
    for text in lines:
        try:
            line = json.loads(text)
        except ValueError:
            break  # the kill came in the middle of it
        noted[line["name"]] = line
    return noted


def _crc_of(file: int, start: int, length: int) -> int | None:
    """Of bytes of a file; ``None`` where it ends before."""
    crc, end = 0, start + length
    while start < end:
        chunk = os.pread(file, min(_CHUNK_BYTES, end - start), start)
        if not chunk:
            return None
        crc, start = zlib.crc32(chunk, crc), start + len(chunk)
    return crc
