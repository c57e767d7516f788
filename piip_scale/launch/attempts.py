"""A job's history: one line when an attempt begins, one when it has ended, in ``job/attempts.jsonl``."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from piip_scale.errors import RunError
from piip_scale.files import IO_REASON, disk_errors
from piip_scale.logging import get_logger
from piip_scale.run.ending import Ending, checked, parse_ending

End = Literal["done", "stopped", "crashed", "hang", "lost_node", "preflight", "cut"]
Action = Literal["finish", "requeue", "restart", "give_up"]


@dataclass(frozen=True)
class Attempt:
    """One start of the training, with what became of it.

    Attributes:
        attempt: Its number, from 0.
        job_id: Slurm's job, 0 without one.
        restart_count: How often that job had been requeued.
        nodes: Where it ran.
        started_unix_s: When it began.
        first_step: Step of the newest valid checkpoint then; 0 for none.
        ended_unix_s: When it ended; ``None`` while it runs, or where nobody saw its end.
        waited_for_save_s: How long its ranks were given to save, where they had not by the end of the job's time.
        end: How: ``done``; ``stopped``, asked to and saved; ``crashed``; ``hang``; ``lost_node``; ``preflight``, too
            few healthy nodes; ``cut``, its supervisor ended with it.
        last_step: Step of the newest valid checkpoint at the end.
        ending: What its ranks, or whoever ended them, left about it; empty while it runs.
        decision: What follows: ``finish``, ``requeue``, ``restart`` (in the same allocation) or ``give_up``.
        why: The decision's reason, in one line.
    """

    attempt: int
    job_id: int
    restart_count: int
    nodes: tuple[str, ...]
    started_unix_s: float
    first_step: int = 0
    waited_for_save_s: float = 0.0
    ended_unix_s: float | None = None
    end: End | None = None
    last_step: int = 0
    ending: Ending = field(default_factory=Ending)
    decision: Action | None = None
    why: str = ""

    @property
    def has_progressed(self) -> bool:
        """Whether it left a newer checkpoint than it began with, or the end of the run."""
        return self.end == "done" or self.last_step > self.first_step

    @property
    def seconds(self) -> float:
        """How long it took; 0 where that is not known."""
        return max(self.ended_unix_s - self.started_unix_s, 0.0) if self.ended_unix_s else 0.0

    @property
    def failed(self) -> bool:
        """Whether it ended otherwise than by its own end or by being asked to."""
        return self.end not in (None, "done", "stopped")


class History:
    """The attempts of a run's job, in its file.

    A line is written whole and to the disk before anything follows from it; one that a kill cut short is passed over.
    On a full disk lines wait in memory for room: that must not end a job which may find some.

    Args:
        path: ``job/attempts.jsonl``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting: list[str] = []

    def read(self) -> tuple[Attempt, ...]:
        """All attempts, the oldest first; none where there is no file.

        Raises:
            RunError: The file is there and cannot be read.
        """
        try:
            with disk_errors(RunError, f"read {self.path}"):
                text = self.path.read_bytes().decode("utf-8", errors="replace")
        except RunError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
            text = ""
        return parse_attempts([*text.splitlines(), *self._waiting])

    def write(self, attempt: Attempt) -> None:
        """Adds what is known of an attempt by now.

        Raises:
            RunError: The place cannot be written, now or later.
        """
        self._waiting.append(json.dumps(_without_empty(asdict(attempt))))
        try:
            with disk_errors(RunError, f"write {self.path}"):
                _append(self.path, self._waiting)
        except RunError as error:
            if error.reason != IO_REASON:
                raise
            get_logger(__name__).warning("piip-scale: warning: %s; it waits in memory meanwhile", error.line)
        else:
            self._waiting.clear()


def _append(path: Path, lines: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        # A line that a kill cut short must not take this one with it.
        file.seek(max(file.tell() - 1, 0))
        is_torn = file.read(1) not in (b"", b"\n")
        file.write((b"\n" if is_torn else b"") + "".join(f"{line}\n" for line in lines).encode())
        file.flush()
        os.fsync(file.fileno())


def parse_attempts(lines: Iterable[str]) -> tuple[Attempt, ...]:
    """Attempts from lines: the last of a number holds all; those that cannot be read are passed over."""
    found = {}
    for line in lines:
        with suppress(ValueError, TypeError, AttributeError, KeyError, RecursionError):
            attempt = _parse_attempt(json.loads(line))
            found[int(attempt.attempt)] = attempt
    return tuple(found[number] for number in sorted(found))


def _parse_attempt(values: Mapping[str, Any]) -> Attempt:
    known = {field.name for field in fields(Attempt)} & values.keys()
    own = {key: values[key] for key in known}
    if own.get("end") not in (None, *get_args(End)) or own.get("decision") not in (None, *get_args(Action)):
        raise ValueError(f"an end or a decision of another version: {own}")
    return checked(Attempt(**own | {"nodes": tuple(own["nodes"]), "ending": parse_ending(own.get("ending", {}))}))


def _without_empty(values: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is as good as absent, so that a person can read the file."""
    plain = {key: _without_empty(value) if isinstance(value, dict) else value for key, value in values.items()}
    return {key: value for key, value in plain.items() if value not in (None, "", {})}


def next_number(history: Sequence[Attempt]) -> int:
    """The number of the attempt to come."""
    return history[-1].attempt + 1 if history else 0
