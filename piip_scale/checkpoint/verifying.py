"""What was written, read back from the disk and compared with the checkpoint, byte for byte."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from piip_scale.checkpoint.copying import Job, copy
from piip_scale.checkpoint.safetensors_writer import Entry
from piip_scale.errors import CheckpointError


def compare(path: Path, jobs: Sequence[Job], starts: Mapping[str, int]) -> None:
    """Copies the tensors once more, into a comparison with a file that holds them.

    Args:
        path: The file, which is on the disk.
        jobs: Its tensors.
        starts: The first byte of each in the file.

    Raises:
        CheckpointError: A tensor differs.
        OSError: The file cannot be read.
    """
    written = os.open(path, os.O_RDONLY)

    def check(entry: Entry, first: int, data: memoryview) -> None:
        # A bytearray compares with any buffer in one go; a memoryview goes element by element.
        if bytearray(os.pread(written, len(data), starts[entry.name] + first)) != data:
            raise CheckpointError(
                f"{entry.name} was written to {path} and reads back otherwise",
                fix="look at that disk, then convert again",
            )

    try:
        # Pages in memory would only be compared with themselves.
        os.posix_fadvise(written, 0, 0, os.POSIX_FADV_DONTNEED)
        for _ in copy(jobs, check):
            continue
    finally:
        os.close(written)
