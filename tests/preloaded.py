"""Pythons forked from one that has imported torch, DeepSpeed and mmdet (``fork_server``).

The ranks that a forked process starts on its machine are forked from it likewise. What is about new processes (the
environment they begin with, how they die with their parent) takes ``subprocess`` instead.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import io
import os
import queue
import runpy
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import torch

# Has torch's tensors travel to processes.
import torch.multiprocessing
from fork_server import context

from piip_scale.world import World, held_port


def run_ranks(num_ranks: int, function, *args, timeout_s: float = 240):
    """Runs ``function(world, device, *args)`` on every rank; returns what each returned, or raises a failure."""
    made = context()
    results = made.Queue()
    with held_port() as port:
        processes = [
            made.Process(target=_rank_main, args=(results, rank, num_ranks, port, function, args), daemon=True)
            for rank in range(num_ranks)
        ]
        for process in processes:
            process.start()
        try:
            return _collect(results, num_ranks, timeout_s)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _collect(results, num_ranks: int, timeout_s: float) -> list:
    found = {}
    try:
        while len(found) < num_ranks:
            rank, value, failure = results.get(timeout=timeout_s)
            if failure:
                raise AssertionError(f"rank {rank} failed:\n{failure}")
            found[rank] = value
    except queue.Empty:
        raise AssertionError(f"ranks {sorted(set(range(num_ranks)) - set(found))} hang") from None
    return [found[rank] for rank in range(num_ranks)]


def _leave_imports_to_stay() -> None:
    """What was imported is no garbage, and DeepSpeed collects none for each report of memory, up to 20 an engine."""
    gc.freeze()
    for module in ("deepspeed.runtime.utils", "deepspeed.runtime.zero.utils"):
        importlib.import_module(module).gc = SimpleNamespace(collect=lambda: 0)


def _rank_main(results, rank: int, num_ranks: int, port: int, function, args) -> None:
    from piip_scale.engine.zero.setup import init_distributed

    _leave_imports_to_stay()
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


class Python:
    """``python ARGUMENTS`` in a forked process, with what tests use of ``subprocess.Popen``; text only.

    Output goes to files, which nobody has to empty; ``stderr=STDOUT`` joins both as there.
    """

    def __init__(
        self,
        arguments: Sequence[object],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        stderr: int | None = None,
        preexec_fn: Callable[[], None] | None = None,
    ) -> None:
        self.args = list(map(str, arguments))
        self._folder = tempfile.TemporaryDirectory()
        outputs = [Path(self._folder.name) / name for name in ("stdout", "stderr")]
        joined = [outputs[0]] * 2 if stderr == subprocess.STDOUT else outputs
        for path in outputs:
            path.touch()
        settings = (self.args, dict(os.environ if env is None else env), str(cwd or Path.cwd()), joined, preexec_fn)
        self._process = context().Process(target=_main, args=settings)
        self._process.start()
        self.pid = self._process.pid
        self.stdout, self.stderr = (path.open(errors="replace") for path in outputs)

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        return self.stdout.read(), self.stderr.read()

    def next_line(self, timeout: float = 120) -> str:
        """The next line of standard output, once it is there whole; what there is of it where the process has ended."""
        line, deadline = "", time.monotonic() + timeout
        while not line.endswith("\n"):
            has_ended = self.poll() is not None
            line += (more := self.stdout.readline())
            if has_ended and not more:
                break
            assert time.monotonic() < deadline, f"no line of {self.args} within {timeout} s"
            time.sleep(0 if more else 0.01)
        return line

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()


def run(arguments: Sequence[object], *, timeout: float = 240, check: bool = False, **settings):
    """``subprocess.run`` of such a process, with its output."""
    process = Python(arguments, **settings)
    try:
        stdout, stderr = process.communicate(timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise
    if check and process.returncode:
        raise AssertionError(f"exit code {process.returncode} of {arguments}:\n{stderr}")
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def _main(arguments: list[str], environment: dict[str, str], folder: str, outputs: list[Path], preexec_fn) -> None:
    from piip_scale.engine import local_launch

    _leave_imports_to_stay()
    if preexec_fn is not None:
        preexec_fn()
    os.chdir(folder)
    for path, number in zip(outputs, (1, 2), strict=True):
        file = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    sys.stdout, sys.stderr = (io.TextIOWrapper(os.fdopen(number, "wb", 0), write_through=True) for number in (1, 2))
    local_launch._start = _fork_rank
    with contextlib.suppress(BrokenPipeError):
        _run_python(arguments, environment)


def _run_python(arguments: Sequence[str], environment: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ |= environment
    # Imports asked for it in another environment.
    tempfile.tempdir = None
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", "1")))
    if arguments[0] == "-m":
        sys.argv = list(arguments[1:])
        # Not as __main__: whoever imported it before would have it twice.
        importlib.import_module(arguments[1]).main()
    elif arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = list(arguments)
        sys.path.insert(0, str(Path(arguments[0]).parent))
        runpy.run_path(arguments[0], run_name="__main__")


class _ForkedRank:
    """A process of this one, with what ``launch_local`` uses of ``subprocess.Popen``."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        return self._reap(os.WNOHANG)

    def wait(self) -> int | None:
        return self._reap(0)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def _reap(self, options: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode


def _fork_rank(command: Sequence[str], environment: Mapping[str, str]):
    """In place of ``local_launch._start``: the same session, death with the parent, and end."""
    from piip_scale.engine import local_launch

    if command[0] != sys.executable:
        return local_launch.subprocess.Popen(command, env=dict(environment), start_new_session=True)
    die_with_parent = local_launch._dying_with_parent()
    pid = os.fork()
    if pid:
        return _ForkedRank(pid)
    code = 1
    try:
        os.setsid()
        if die_with_parent:
            die_with_parent()
        _run_python(command[1:], environment)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 - as a Python that ends by it
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
