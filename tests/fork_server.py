"""The Python from which a test run's processes are forked: it has imported what costs a new one 4 to 11 s of a core.

One serves the run: xdist's workers are forked from it, and fork from it themselves. What it imported is the code as it
is, nothing is built yet. pytest's controller uses this too, so nothing heavy is imported here.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
from collections.abc import Iterator
from multiprocessing import forkserver
from multiprocessing.reduction import DupFd
from pathlib import Path

from execnet import gateway_io
from execnet.gateway_base import Popen2IO

from piip_scale.registry import TASKS

_HEAVY = [
    "torch",
    "deepspeed",
    # What DeepSpeed imports for the first engine of a process: torch's compiler, setuptools.
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.ops.op_builder.all_ops",
    "piip_scale.engine.session",
    "piip_scale.tasks.mmlab",
    *(f"piip_scale.tasks.{task}.{part}" for task in TASKS for part in ("task", "model")),
    "piip_scale.cli.app",
    # What the modules of tests import, which each worker collects.
    "pytest",
    "hypothesis",
    "tensorboard.backend.event_processing.event_accumulator",
    "piip_scale.serving.server",
    "boto3",
    "sklearn.datasets",
]


def context():
    """A multiprocessing context; on a machine with GPUs one that starts Python anew, since CUDA survives no fork."""
    if Path("/proc/driver/nvidia").exists():
        return multiprocessing.get_context("spawn")
    # As init_distributed would say; deepspeed looks while it is imported.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(_HEAVY)
    return made


def fork_workers() -> None:
    """Has execnet, which starts xdist's workers, fork them."""
    if context().get_start_method() == "forkserver":
        with _silence():
            forkserver.ensure_running()
        gateway_io.create_io = lambda _spec, execmodel: _ForkedIO(execmodel)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Started now, a process says nothing on the terminal for good: what tests read has files of its own."""
    kept = {number: os.dup(number) for number in (1, 2)}
    with open(os.devnull, "wb") as nowhere:
        for number in kept:
            os.dup2(nowhere.fileno(), number)
    try:
        yield
    finally:
        for number, file in kept.items():
            os.dup2(file, number)
            os.close(file)


class _ForkedIO(Popen2IO):
    """A worker's streams and its process, in place of ``gateway_io.Popen2IOMaster``."""

    def __init__(self, execmodel) -> None:
        theirs, to_worker = os.pipe()
        from_worker, mine = os.pipe()
        self._process = context().Process(target=_work, args=(_Given(theirs), _Given(mine), _Given(2)))
        self._process.start()
        os.close(theirs)
        os.close(mine)
        super().__init__(os.fdopen(to_worker, "wb"), os.fdopen(from_worker, "rb"), execmodel)

    def wait(self) -> int | None:
        self._process.join()
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()


class _Given:
    """An open file that the started process gets."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __getstate__(self):
        return DupFd(self._number)

    def __setstate__(self, state) -> None:
        self.number = state.detach()


def _work(*streams: _Given) -> None:
    """What ``python -c`` does for execnet: runs the line that it sends, which serves it to the end."""
    # By itself a forked process would start a server of its own.
    forkserver._forkserver.ensure_running = lambda: None
    for number, given in enumerate(streams):
        os.dup2(given.number, number)
        os.close(given.number)
    sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", closefd=False)
    exec(eval(os.fdopen(0, "rb", 0, closefd=False).readline()), {"__name__": "__main__"})
