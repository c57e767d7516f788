"""Weights from a checkpoint's files into safetensors files: read by place, cast in the cache, written by place.

Workers take tensor after tensor, in the order of the file. A tensor's bytes pass through a buffer of a worker once; the
one pass gives the checksum of what was written and, by ``crc.combined``, that of each record of the source, which is
held against what ``torch.save`` left in its zip file.
"""

from __future__ import annotations

import os
import threading
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass

from piip_scale.checkpoint.casts import cast
from piip_scale.checkpoint.crc import combined
from piip_scale.checkpoint.dtypes import DType
from piip_scale.checkpoint.reading import OpenFiles
from piip_scale.checkpoint.safetensors_writer import Entry
from piip_scale.checkpoint.stored import Weight
from piip_scale.checkpoint.stored_tensor import Read, Storage, StoredTensor
from piip_scale.errors import CheckpointError

# Large enough that a read costs more than the call, small enough for a core's cache.
_CHUNK_BYTES = 1 << 20
_MOST_WORKERS = 16

Write = Callable[[Entry, int, memoryview], None]
"""Takes a part of a tensor: its entry, the part's first byte, the bytes."""


@dataclass(frozen=True)
class Job:
    """A tensor to be copied."""

    entry: Entry
    weight: Weight


@dataclass(frozen=True)
class Copied:
    """A tensor that was copied.

    Attributes:
        entry: It.
        crc32: Of its bytes as written.
        reads: What was read of it.
    """

    entry: Entry
    crc32: int
    reads: tuple[Read, ...]


def num_workers(num_jobs: int) -> int:
    """Threads that copy side by side: one a core that this process may use."""
    return max(1, min(num_jobs, len(os.sched_getaffinity(0)), _MOST_WORKERS))


def copy(jobs: Sequence[Job], write: Write) -> Iterator[Copied]:
    """Copies tensors, and yields each when it is written.

    Raises:
        CheckpointError: A file ends early or cannot be read, or a number has no place in the dtype asked for.
        OSError: The disk refuses what is written.
    """
    stop = threading.Event()
    workers = num_workers(len(jobs))
    local = threading.local()

    def work(job: Job) -> Copied:
        if not hasattr(local, "worker"):
            local.worker = _Worker(write, stop)
        done: Copied = local.worker.copy(job)
        return done

    with ThreadPoolExecutor(workers) as pool:
        left = [pool.submit(work, job) for job in jobs]
        try:
            for done in as_completed(left):
                yield done.result()
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)


class _Worker:
    """One thread's buffer and open files."""

    def __init__(self, write: Write, stop: threading.Event) -> None:
        self._write, self._stop = write, stop
        self._files = OpenFiles()
        self._buffer = memoryview(bytearray(_CHUNK_BYTES))

    def copy(self, job: Job) -> Copied:
        entry, crc, done = job.entry, 0, 0
        reads: list[Read] = []
        for part in job.weight.parts:
            tensor = part.tensor(job.weight.dtype)
            convert = _conversion(job, tensor.dtype, part.slice.first)
            is_as_read = convert is None and tensor.is_contiguous
            read_crc = 0
            for raw, chunk in self._chunks(tensor, part.slice.start, part.slice.length):
                out = chunk if convert is None else self._cast(convert, chunk, entry)
                self._write(entry, done, out)
                done += len(out)
                read_crc = zlib.crc32(raw, read_crc)
                crc = crc if is_as_read else zlib.crc32(out, crc)
            reads.append(read_of(tensor, part.slice.start, part.slice.length, read_crc))
            if is_as_read:
                crc = combined(crc, read_crc, reads[-1].num_bytes)
        return Copied(entry, crc, (*reads, *(job.weight.addition.reads if job.weight.addition else ())))

    def _cast(self, convert: Callable[[memoryview], memoryview], chunk: memoryview, entry: Entry) -> memoryview:
        try:
            return convert(chunk)
        except OverflowError as error:
            raise CheckpointError(
                f"{entry.name} holds numbers too large for {entry.dtype.name}",
                value=error.args[0],
                rule="they would become infinite",
                fix="write bf16 or fp32",
            ) from None

    def _chunks(self, tensor: StoredTensor, first: int, length: int) -> Iterator[tuple[memoryview, memoryview]]:
        """What is read at a time, and the elements wanted of it, in order: the same bytes where they are contiguous."""
        if not tensor.is_contiguous:
            spread = memoryview(bytearray(tensor.span * tensor.dtype.itemsize))
            self._files.read_elements(spread, tensor, 0)
            yield spread, _gathered(spread, tensor, first, length)
            return
        size, last = tensor.dtype.itemsize, first + length
        while first < last and not self._stop.is_set():
            chunk = self._buffer[: min((last - first) * size, _CHUNK_BYTES)]
            self._files.read_elements(chunk, tensor, first)
            yield chunk, chunk
            first += len(chunk) // size


def _conversion(job: Job, dtype: DType, first: int) -> Callable[[memoryview], memoryview] | None:
    """From bytes of a weight from an element on to those of the entry; ``None`` where they are the same."""
    if job.weight.addition is not None:
        return job.weight.addition.adder(dtype, job.entry.dtype, first)
    return None if dtype == job.entry.dtype else cast(dtype, job.entry.dtype)


def read_of(tensor: StoredTensor, first: int, length: int, crc: int) -> Read:
    """The bytes that are read for elements of a tensor, with their checksum."""
    if not tensor.is_contiguous:
        first, length = 0, tensor.span
    size = tensor.dtype.itemsize
    return Read(tensor.storage, (tensor.offset + first) * size, length * size, crc)


def _gathered(spread: memoryview, tensor: StoredTensor, first: int, length: int) -> memoryview:
    """Elements of a flattened tensor that is not contiguous."""
    import numpy as np

    size = tensor.dtype.itemsize
    held = np.frombuffer(spread, f"u{size}")
    strides = [stride * size for stride in tensor.strides]
    flat = np.lib.stride_tricks.as_strided(held, tensor.shape, strides).reshape(-1)[first : first + length]
    return np.ascontiguousarray(flat).data.cast("B")


def check_reads(reads: Iterable[Read]) -> int:
    """Holds what was read against the checksums that the files themselves carry.

    Returns:
        How many records carry none.

    Raises:
        CheckpointError: A record was changed after it was saved.
    """
    of_storage: dict[Storage, list[Read]] = defaultdict(list)
    for read in reads:
        of_storage[read.storage].append(read)
    files, unknown = OpenFiles(), 0
    for storage, parts in of_storage.items():
        if storage.data is not None:
            continue  # of a file that was compared with its checksum as a whole
        if storage.crc32 is None:
            unknown += 1
        elif (found := _whole_crc(storage, parts, files)) != storage.crc32:
            raise CheckpointError(
                f"{storage.path} was changed after it was saved: its record at byte {storage.start} has checksum "
                f"{found:08x}",
                rule=f"the file says {storage.crc32:08x}",
                fix="take another checkpoint",
            )
    return unknown


def _whole_crc(storage: Storage, parts: Sequence[Read], files: OpenFiles) -> int:
    """Of all of a storage; what was not read of it, as padding, is read here."""
    crc, end = 0, 0
    for part in sorted(set(parts), key=lambda part: (part.first, -part.num_bytes)):
        if part.first < end:
            # Read twice: under a second name whole, and passed over, or in another cut.
            if part.first + part.num_bytes <= end:
                continue
            return _crc_of(storage, 0, storage.num_bytes, 0, files)
        crc = _crc_of(storage, end, part.first, crc, files)
        crc, end = combined(crc, part.crc32, part.num_bytes), part.first + part.num_bytes
    return _crc_of(storage, end, storage.num_bytes, crc, files)


def _crc_of(storage: Storage, first: int, end: int, crc: int, files: OpenFiles) -> int:
    while first < end:
        chunk = memoryview(bytearray(min(end - first, _CHUNK_BYTES)))
        files.read_into(chunk, storage.path, storage.start + first)
        crc, first = zlib.crc32(chunk, crc), first + len(chunk)
    return crc
