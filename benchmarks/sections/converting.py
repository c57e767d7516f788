"""Converting beside DeepSpeed's own API: seconds and memory of whole processes, run in turns."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import psutil

from sections.record import table
from sections.zero_folders import vit_shapes, write_zero3

_MIB = 2**20
_MB = 10**6
_KIB = 2**10
_CHUNK = 4 * _MIB
_ROUNDS = 3
_RANKS = 4
# Of a block each: width, and blocks for 0.41, 3 and 7.3 billion parameters.
_SMALL = (1280, 21)
_LARGE = ((3200, 24), (3200, 59))
_END = "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0], file=sys.stderr)"
_OURS = """import sys
from piip_scale.cli.main import main
from piip_scale.checkpoint.convert import convert
sys.argv = ['piip-scale', 'convert', *sys.argv[1:]]
try:
    main() if sys.argv[2:] else None
finally:
    {end}
"""
_THEIRS = """import sys
from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_state_dict
if sys.argv[1:]:
    kind = {{'fp32': 'float32', 'bf16': 'bfloat16'}}[sys.argv[4]]
    convert_zero_checkpoint_to_state_dict(sys.argv[1], sys.argv[2], kind, None, True)
{end}
"""
_ULIMIT = 1.5
# Of an element, by what is asked for.
_BYTES = {"fp32": 4, "bf16": 2}
_TEXT = (
    "ZeRO-3 on {ranks} ranks, fp32 masters and two moments; whole processes from start to end, medians of {rounds} "
    "rounds in turns. Warm: the source's pages are in memory; cold: they are not. Ours: `piip-scale convert`, which "
    "checks each byte, makes a checksum a tensor and waits until the disk has all; DeepSpeed's: "
    "`convert_zero_checkpoint_to_state_dict` with safetensors in one file, which does none of that. Memory is VmHWM, "
    "what was imported included. {priority}"
)
_AT_PRIORITY = "At real-time priority (`chrt -r 50`), so that what else ran on the {cores} cores did not take part."
_BESIDE = "Other processes may have run beside: load average {load:.1f} on {cores} cores at the end."
_DISK = (
    "The disk alone, in the same minutes: {read:.1f} s to read as many bytes as the masters have, cold and in order; "
    "{fp32:.1f} s to write and sync what fp32 takes, {bf16:.1f} s what bf16 does (`dd conv=fsync`)."
)
_LARGE_TEXT = (
    "ZeRO-3 on {ranks} ranks; the files are sparse, so reading costs no disk, and every byte of the output is written. "
    "Address space is limited to {times} times the largest file. DeepSpeed's API keeps the model and mapped files in "
    "memory, more than this machine's {gib:.0f} GiB for the larger one, and was not run."
)


@dataclass(frozen=True)
class Run:
    """One process."""

    seconds: float
    cpu_seconds: float
    peak_mib: float


def run(code: str, arguments: list[str], limit_bytes: int = 0) -> Run:
    """A new Python's wall and processor time, and the peak of its memory (VmHWM, mapped files included)."""
    limit = f"ulimit -v {limit_bytes // _KIB}; " if limit_bytes else ""
    command = ["sh", "-c", f'{limit}exec "$@"', "sh", sys.executable, "-c", code.format(end=_END), *arguments]
    before, start = os.times(), time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, after = time.perf_counter() - start, os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return Run(seconds, cpu, int(done.stderr.split()[-1]) / _KIB)


def section() -> str:
    """Both on a checkpoint of 0.41 billion parameters, to fp32 and bf16, its pages in memory and not."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        count = write_zero3(root / "source", vit_shapes(*_SMALL), _RANKS, sparse=False)
        rows = [["nothing: imports", *_compared(root, [])]]
        for dtype in _BYTES:
            for is_cold in (False, True):
                cells = _compared(root, ["--dtype", dtype], is_cold=is_cold)
                rows.append([f"{count / 1e9:.2f} B, {dtype}, {'cold' if is_cold else 'warm'}", *cells])
        disk = _DISK.format(
            read=statistics.median(_read_seconds(root / "source", count * 4) for _ in range(_ROUNDS)),
            **{
                dtype: count * size / _MB / _write_speed(root / "plain", count * size) for dtype, size in _BYTES.items()
            },
        )
    head = ["", "ours, s", "DeepSpeed's, s", "ratio", "ours, CPU s", "DeepSpeed's", "ours, MiB", "DeepSpeed's"]
    text = _TEXT.format(ranks=_RANKS, rounds=_ROUNDS, priority=_priority())
    return f"{text}\n\n{table(head, rows)}\n\n{disk}"


def _priority() -> str:
    """How far other processes took part."""
    is_real_time = os.sched_getscheduler(0) in (os.SCHED_RR, os.SCHED_FIFO)
    return (_AT_PRIORITY if is_real_time else _BESIDE).format(cores=os.cpu_count(), load=os.getloadavg()[0])


def _compared(root: Path, options: list[str], *, is_cold: bool = False) -> list[str]:
    ours: list[Run] = []
    theirs: list[Run] = []
    for _ in range(_ROUNDS):
        for runs, code, out in ((ours, _OURS, "out.safetensors"), (theirs, _THEIRS, "out")):
            os.sync()
            _set_pages(root / "source", in_memory=not is_cold)
            runs.append(run(code, [str(root / "source"), str(root / out), *options] if options else []))
            _remove(root / out)
    mine, other = (
        [statistics.median(getattr(one, key) for one in runs) for key in ("seconds", "cpu_seconds", "peak_mib")]
        for runs in (ours, theirs)
    )
    return [
        *(f"{value:.1f}" for value in (mine[0], other[0])),
        f"**{mine[0] / other[0]:.2f}**",
        *(f"{value:.1f}" for value in (mine[1], other[1])),
        *(f"{value:.0f}" for value in (mine[2], other[2])),
    ]


def _set_pages(source: Path, *, in_memory: bool) -> None:
    """Has the page cache hold all of a checkpoint, or nothing of it."""
    for path in source.rglob("*.pt"):
        with path.open("rb", buffering=0) as file:
            if in_memory:
                _read(file, path.stat().st_size)
            else:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _read_seconds(source: Path, num_bytes: int) -> float:
    """To read so many bytes of a checkpoint's files, the same share of each, none of them in memory."""
    _set_pages(source, in_memory=False)
    paths = sorted(source.rglob("*optim_states.pt"))
    start = time.perf_counter()
    for path in paths:
        with path.open("rb", buffering=0) as file:
            _read(file, num_bytes // len(paths))
    return time.perf_counter() - start


def _read(file: FileIO, num_bytes: int) -> None:
    buffer = bytearray(_CHUNK)
    while num_bytes > 0 and (count := file.readinto(buffer)):
        num_bytes -= count


def _remove(out: Path) -> None:
    if out.is_dir():
        shutil.rmtree(out)
    for path in (out, out.with_name("out.manifest.json")):
        if path.is_file():
            path.unlink()


def _write_speed(path: Path, num_bytes: int) -> float:
    """MB/s at which the disk takes as many bytes, in one file."""
    count = num_bytes // _CHUNK
    start = time.perf_counter()
    command = ["dd", "if=/dev/zero", f"of={path}", f"bs={_CHUNK}", f"count={count}", "conv=fsync", "status=none"]
    subprocess.run(command, check=True)
    seconds = time.perf_counter() - start
    path.unlink()
    return count * _CHUNK / _MB / seconds


def large_section() -> str:
    """Ours alone on sparse files of 3 and 7.3 billion parameters, also with little address space."""
    rows = []
    for width, depth in _LARGE:
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            count = write_zero3(root / "source", vit_shapes(width, depth), _RANKS, sparse=True)
            largest = max(path.stat().st_size for path in (root / "source").rglob("*.pt"))
            for dtype, size in _BYTES.items():
                _require_room(root, count * size)
                done = run(
                    _OURS,
                    [str(root / "source"), str(root / "out.safetensors"), "--dtype", dtype],
                    int(_ULIMIT * largest),
                )
                _remove(root / "out.safetensors")
                rate = count * size / _MB / done.seconds
                limit = f"{_ULIMIT * largest / 2**30:.1f}"
                rows.append(
                    [
                        f"{count / 1e9:.2f} B, {dtype}",
                        limit,
                        f"{done.seconds:.1f}",
                        f"{rate:.0f}",
                        f"{done.peak_mib:.0f}",
                    ]
                )
    head = ["", "ulimit -v, GiB", "s", "MB/s written", "MiB"]
    text = _LARGE_TEXT.format(ranks=_RANKS, times=_ULIMIT, gib=psutil.virtual_memory().total / 2**30)
    return f"{text}\n\n{table(head, rows)}"


def _require_room(root: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(root).free
    if free < num_bytes:
        raise SystemExit(f"{root} has {free} bytes free; the output takes {num_bytes}")
