"""A run is a directory: resolved config, environment, status, errors, checkpoints."""

from __future__ import annotations

import json
import math
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

from piip_scale.errors import PiipError, RunError
from piip_scale.files import disk_errors, write_text_atomically
from piip_scale.logging import get_logger
from piip_scale.run.checkpoint_signs import sign_of_checkpoints
from piip_scale.run.earlier import set_aside
from piip_scale.run.ending import Ending, ending_of, parse_ending
from piip_scale.run.starting import process_age_seconds

State = Literal["running", "stopped", "failed", "done"]

# Held from reading a status to replacing it: threads of this process do both.
_CHANGING_STATUS = threading.RLock()


@dataclass(frozen=True)
class Status:
    """How far a run is, and whether it is still going.

    Attributes:
        state: ``running``, ``stopped`` (asked to, saved), ``failed`` or ``done``.
        step: Optimiser steps behind it.
        ending: How it ended; ``None`` while it runs, and of a run that is done.
        checkpoint_step: Step of the newest checkpoint it is known to have written; 0 for none.
    """

    state: State
    step: int
    ending: Ending | None = None
    checkpoint_step: int = 0

    @property
    def line(self) -> str:
        """The ending's line; empty without one."""
        return self.ending.line if self.ending else ""


def write_text_atomic(path: Path, text: str) -> None:
    """Writes a file of a run that is there whole or not at all.

    Raises:
        RunError: The disk is full or the place cannot be written.
    """
    with disk_errors(RunError, f"write {path}"):
        write_text_atomically(path, text)


class RunDirectory:
    """The files of one run, by name. Writing is for the main rank, errors, stacks, heartbeats and broken samples aside.

    Ranks start and fail in any order: what was written before this process began is of an earlier launch and does not
    count, so that no rank has to wait until the main rank has cleared it away.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.config = self.path / "config.py"
        self.resumed_config = self.path / "resumed_config.py"
        self.environment = self.path / "environment.json"
        self.status_file = self.path / "status.json"
        self.errors = self.path / "errors"
        self.stacks = self.path / "stacks"
        self.stacks_wanted = self.stacks / "wanted"
        self.heartbeats = self.path / "heartbeats"
        self.checkpoints = self.path / "checkpoints"
        self.broken_samples = self.path / "broken_samples"
        self.bad_steps = self.path / "bad_steps"
        self.profile = self.path / "profile"
        self.gpu_time = self.path / "gpu_time.json"
        self.metrics = self.path / "metrics.jsonl"
        self.superseded_metrics = self.path / "metrics.superseded.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.trackers = self.path / "trackers.json"
        self.last_evaluation = self.path / "last_evaluation"

    @property
    def newest_config(self) -> Path:
        """The config that the run last went on with."""
        return self.resumed_config if self.resumed_config.is_file() else self.config

    def check(self, *, resume: bool, restart: bool = False) -> None:
        """Refuses a directory that holds a run already, or none to resume; writes nothing.

        Args:
            resume: The run in it is to go on.
            restart: A run in it is to be set aside.

        Raises:
            RunError: The directory is not fit for it.
        """
        if self.path.exists() and not self.path.is_dir():
            raise RunError("run directory", value=str(self.path), rule="it must be a directory, and is a file")
        if restart:
            return
        status = self.status()
        # Of a run whose status is gone, the checkpoints still are its checkpoints.
        held = f"{status.state} at step {status.step}" if status else sign_of_checkpoints(self)
        if held and not resume:
            raise RunError(
                f"run directory {self.path} holds a run ({held})",
                fix="add --resume to continue it, --restart to set it aside and start over, or choose another "
                "--run-dir",
            )
        if resume and not held:
            raise RunError(f"run directory {self.path} holds no run to resume", fix="leave out --resume")

    def open(self, config_text: str, *, resume: bool, restart: bool = False) -> None:
        """Creates or reopens the directory and records the environment and the command. Main rank only.

        Args:
            config_text: The resolved config. A resumed run keeps the one it started with, unless that is gone; where
                this one differs, it is written beside it, and a warning is logged.
            resume: Continue the run that is there.
            restart: Start over: all that is there of a run moves into a folder of ``earlier``.

        Raises:
            RunError: The directory holds a run and neither is on, holds none and ``resume`` is, or cannot be written.
        """
        self.check(resume=resume, restart=restart)
        if restart:
            self.start_over()
        self.clear_traces(before_unix_s=process_start_unix_s())
        self._set_aside_overwritten(config_text, resume=resume and not restart)
        self._keep_config(config_text, resume=resume and not restart)
        # Here, since it imports torch: who only reads a run's files, as commands about jobs do, need not wait for it.
        from piip_scale.run.environment import describe_environment

        write_text_atomic(self.environment, json.dumps(describe_environment(), indent=2) + "\n")

    def start_over(self) -> None:
        """Sets aside all that is there of a run but its job's files; nothing where there is none. Main rank only.

        Raises:
            RunError: The disk refuses.
        """
        # Not `job`: the job that may be running this start over keeps its own records there.
        paths = (
            *(self.config, self.resumed_config, self.environment, self.status_file, self.checkpoints),
            *(self.broken_samples, self.bad_steps, self.profile),
            *(self.gpu_time, self.metrics, self.superseded_metrics, self.tensorboard),
            *(self.last_evaluation, self.trackers),
        )
        with disk_errors(RunError, f"set aside the run in {self.path}"):
            folder = set_aside(self.path, paths)
        if folder is not None:
            get_logger(__name__).warning("starting over: the run that was here is in %s", folder)

    def _set_aside_overwritten(self, config_text: str, *, resume: bool) -> None:
        """What this start is about to write anew and was something else."""
        paths = [self.environment, self.resumed_config]
        if not resume and _text_of(self.config) not in (None, config_text):
            paths.append(self.config)
        with disk_errors(RunError, f"set aside earlier files of {self.path}"):
            folder = set_aside(self.path, paths)
        if folder is not None and (folder / self.config.name).exists():
            get_logger(__name__).warning("another %s was here: it is in %s", self.config.name, folder)

    def _keep_config(self, text: str, *, resume: bool) -> None:
        if not (resume and self.config.exists()):
            write_text_atomic(self.config, text)
        elif self.config.read_text(encoding="utf-8") != text:
            write_text_atomic(self.resumed_config, text)
            get_logger(__name__).warning(
                "resuming with another config than %s: it is written to %s", self.config, self.resumed_config.name
            )

    def decide(self, config_text: str) -> None:
        """Puts a config in the place of that which the run was opened with, some keys of which were open.

        Raises:
            RunError: The disk refuses.
        """
        resumed = self.resumed_config.exists()
        write_text_atomic(self.resumed_config if resumed else self.config, config_text)

    def clear_traces(self, before_unix_s: float = math.inf) -> None:
        """Sets aside errors and stacks of earlier processes, and forgets their heartbeats.

        Args:
            before_unix_s: Younger ones stay: other ranks of this launch may have failed already.

        Raises:
            RunError: The disk refuses.
        """
        with disk_errors(RunError, f"create run directory {self.path}"):
            for folder in (self.errors, self.stacks, self.heartbeats):
                folder.mkdir(parents=True, exist_ok=True)
            traces = [*self.errors.iterdir(), *self.stacks.iterdir()]
            set_aside(self.path, [trace for trace in traces if trace.lstat().st_mtime < before_unix_s])
            for beat in [*self.heartbeats.glob("rank_*.json"), *self.heartbeats.glob("node_*.json")]:
                if beat.lstat().st_mtime < before_unix_s:
                    beat.unlink()

    def status(self) -> Status | None:
        """The run's last status; ``None`` where no run started.

        Raises:
            RunError: The status file is not one, or cannot be read.
        """
        try:
            with disk_errors(RunError, f"read {self.status_file}"):
                return _parse_status(json.loads(self.status_file.read_text(encoding="utf-8")))
        except RunError as error:
            if isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
                return None
            raise
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise RunError(f"{self.status_file} cannot be read: {error}", fix="choose another --run-dir") from error

    def write_status(self, state: State, step: int, ending: Ending | None = None) -> None:
        """Replaces the status, but for the checkpoint it knows of. Main rank only, or the rank that failed first.

        A run with a failed rank does not run: ranks that the signal for their stacks woke go on for some moments.
        """
        with _CHANGING_STATUS:
            before = self.status()
            if state == "running" and before and before.state == "failed" and self.first_error():
                return
            self._write_status(Status(state, step, ending, before.checkpoint_step if before else 0))
            # A rank that failed between the two has written its word, and this one over it.
            if state == "running" and (first := self.first_error()):
                self.write_failure(first)

    def note_checkpoint(self, step: int) -> None:
        """Has the status know of a checkpoint, so that its loss is noticed. Main rank only."""
        with _CHANGING_STATUS:
            status = self.status()
            if status is not None:
                self._write_status(replace(status, checkpoint_step=step))

    def _write_status(self, status: Status) -> None:
        write_text_atomic(self.status_file, json.dumps(asdict(status)) + "\n")

    def write_failure(self, ending: Ending) -> None:
        """Puts how a run failed into the status, nothing where it says so already.

        The step is the rank's that failed, or the last that was noted where that is not known or later.

        Raises:
            RunError: The disk refuses, or the status there is none.
        """
        with _CHANGING_STATUS:
            before = self.status()
            if before is None or (before.state, before.ending) != ("failed", ending):
                self.write_status("failed", max(before.step if before else 0, ending.step), ending)

    def record_error(self, rank: int, error: BaseException, step: int = 0, node: str = "") -> Ending | None:
        """Writes a rank's traceback, and claims to be the first that failed.

        Any rank may call it; it never raises, since it runs while another error is on its way.

        Args:
            rank: Whose error.
            error: The error.
            step: Optimiser steps behind the rank.
            node: Where the rank ran; this machine where empty.

        Returns:
            How the run ended where no rank failed before, so that exactly one reports to the user; else ``None``.
        """
        ending = ending_of(error, rank, step, node)
        with suppress(OSError):
            self.errors.mkdir(parents=True, exist_ok=True)
            # Not over a traceback of the rank's own, where its launcher reports for it.
            with (self.errors / f"rank_{rank}.txt").open("x", encoding="utf-8") as file:
                details = error.details if isinstance(error, PiipError) else ""
                file.write("".join(traceback.format_exception(error)) + details + "\n")
        try:
            self._claim(ending)
        except FileExistsError:
            return None
        except OSError:
            # A full or read-only disk must not swallow the error: better reported twice than never.
            return ending
        return ending

    def _claim(self, ending: Ending) -> None:
        claim = self.errors / "first.json"
        with suppress(FileNotFoundError):
            if claim.stat().st_mtime < process_start_unix_s():
                # Of an earlier launch; the main rank sets it aside with the others, which it may not have done yet.
                claim.replace(self.errors / "first_before.json")
        with claim.open("x", encoding="utf-8") as file:
            json.dump(asdict(ending), file)

    def replace_ending(self, ending: Ending) -> None:
        """Writes how the run ended into its files, where somebody knows more than its ranks; their tracebacks stay.

        Raises:
            RunError: The disk refuses.
        """
        write_text_atomic(self.errors / "first.json", json.dumps(asdict(ending)))
        if self.status():
            self.write_failure(ending)

    def first_error(self, since_unix_s: float | None = None) -> Ending | None:
        """The error that ended a launch; ``None`` where no rank got to write one.

        Args:
            since_unix_s: When the launch began; this process's start where ``None``.
        """
        try:
            first = parse_ending(json.loads((self.errors / "first.json").read_text(encoding="utf-8")))
            return first if first.unix_time_s >= (since_unix_s or process_start_unix_s()) else None
        except (OSError, ValueError, TypeError, AttributeError, RecursionError):
            return None


def _parse_status(values: dict[str, Any]) -> Status:
    ending = values.get("ending")
    if values["state"] not in get_args(State) or not isinstance(values["step"], int):
        raise ValueError(f"state {values['state']!r} at step {values['step']!r}")
    # Of earlier versions' runs nothing is known.
    checkpoint_step = values.get("checkpoint_step", 0)
    if not isinstance(checkpoint_step, int):
        raise ValueError(f"checkpoint_step {checkpoint_step!r}")
    return Status(values["state"], values["step"], None if ending is None else parse_ending(ending), checkpoint_step)


def _text_of(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, IsADirectoryError):
        return None


@cache
def process_start_unix_s() -> float:
    """When this process began; where the system does not show it, when it first asked."""
    # Where this process stands still between the two, it seems to have begun earlier.
    return max(time.time() - process_age_seconds() for _ in range(3))
