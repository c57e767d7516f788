"""Processes forked from one that has imported torch, DeepSpeed and mmdet: each new Python takes seconds for that.

One such parent serves all of a test run's processes; what it imported is the code as it is, nothing is built yet.
"""

from __future__ import annotations

import contextlib
import io
import os
import queue
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.multiprocessing

from piip_scale.world import World

_HEAVY = ["torch", "deepspeed", "piip_scale.engine.session", "piip_scale.tasks.mmlab", "piip_scale.cli.main"]


def context():
    """A multiprocessing context; on a machine with GPUs one that starts Python anew, since CUDA survives no fork."""
    if Path("/proc/driver/nvidia").exists():
        return torch.multiprocessing.get_context("spawn")
    # As init_distributed would say; deepspeed looks while it is imported.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    made = torch.multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(_HEAVY)
    return made


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_ranks(num_ranks: int, function, *args, timeout_s: float = 240):
    """Runs ``function(world, device, *args)`` on every rank; returns what each returned, or raises a failure."""
    made = context()
    results, port = made.Queue(), free_port()
    processes = [
        made.Process(target=_rank_main, args=(results, rank, num_ranks, port, function, args), daemon=True)
        for rank in range(num_ranks)
    ]
    for process in processes:
        process.start()
    found = {}
    try:
        while len(found) < num_ranks:
            rank, value, failure = results.get(timeout=timeout_s)
            if failure:
                raise AssertionError(f"rank {rank} failed:\n{failure}")
            found[rank] = value
    except queue.Empty:
        raise AssertionError(f"ranks {sorted(set(range(num_ranks)) - set(found))} hang") from None
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [found[rank] for rank in range(num_ranks)]


def _rank_main(results, rank: int, num_ranks: int, port: int, function, args) -> None:
    from piip_scale.engine.zero.setup import init_distributed

    try:
        torch.set_num_threads(1)
        world = World(rank, num_ranks, rank, num_ranks, "127.0.0.1", port, "torchrun" if num_ranks > 1 else "single")
        value = function(world, init_distributed(world), *args)
        # numpy, since tensors travel by shared memory that dies with this process.
        results.put((rank, value, None))
    except BaseException:  # noqa: BLE001 - the parent reports it
        results.put((rank, None, traceback.format_exc()))
    results.close()
    results.join_thread()


def run_main(arguments: Sequence[str], environment: dict[str, str], timeout: float) -> subprocess.CompletedProcess:
    """``python -m piip_scale.cli.main`` in such a process in place of a new Python; else as ``subprocess.run``."""
    with tempfile.TemporaryDirectory() as folder:
        told = [Path(folder) / name for name in ("stdout", "stderr")]
        process = context().Process(target=_main, args=(list(arguments), environment, os.getcwd(), *told))
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(list(arguments), timeout)
        return subprocess.CompletedProcess(arguments, process.exitcode, *(path.read_text() for path in told))


def _main(arguments: list[str], environment: dict[str, str], folder: str, stdout: Path, stderr: Path) -> None:
    from piip_scale.cli.main import main

    os.environ.clear()
    os.environ |= environment
    os.chdir(folder)
    for path, number in ((stdout, 1), (stderr, 2)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
    sys.stdout, sys.stderr = (io.TextIOWrapper(os.fdopen(number, "wb", 0), write_through=True) for number in (1, 2))
    sys.argv = ["piip-scale", *arguments]
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", "1")))
    with contextlib.suppress(BrokenPipeError):
        main()
