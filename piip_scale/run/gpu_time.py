"""GPU time of a run since its first start, over all its attempts: kept in its directory by the main rank."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from piip_scale.errors import RunError
from piip_scale.files import atomic_file, disk_errors
from piip_scale.logging import get_logger
from piip_scale.run.run_dir import process_start_unix_s


@dataclass(frozen=True)
class GpuTime:
    """One attempt of a run, and what those before it took.

    Attributes:
        attempt: Its number, from 1.
        num_ranks: Of this attempt, one GPU each; on a CPU they count likewise.
        started_unix_s: When its main rank began.
        seen_unix_s: The last sign of it.
        earlier_s: Time of all ranks of all attempts before it, in seconds.
    """

    attempt: int
    num_ranks: int
    started_unix_s: float
    seen_unix_s: float
    earlier_s: float

    def spent_s(self, now_unix_s: float) -> float:
        """Of all ranks of all attempts, in seconds."""
        return self.earlier_s + max(now_unix_s - self.started_unix_s, 0.0) * self.num_ranks


class GpuTimeFile:
    """``gpu_time.json`` of a run. Main rank only.

    Args:
        path: The file.
        num_ranks: Of this attempt.
        last_sign_unix_s: The last sign of the attempt before, where something beside the file knows of one.

    Raises:
        RunError: The disk refuses.
    """

    def __init__(self, path: Path, num_ranks: int, last_sign_unix_s: float = 0.0) -> None:
        self._path = path
        before, began_s = _read(path), process_start_unix_s()
        earlier_s = 0.0
        if before:
            # A clock that was set back, or a file from another run, takes no time off.
            seen_s = min(max(before.seen_unix_s, last_sign_unix_s), began_s)
            earlier_s = before.spent_s(seen_s)
        self._now = GpuTime(before.attempt + 1 if before else 1, num_ranks, began_s, time.time(), earlier_s)
        self.note()

    @property
    def attempt(self) -> int:
        """This attempt's number, from 1."""
        return self._now.attempt

    def spent_s(self) -> float:
        """The seconds that all ranks have taken so far, those of earlier attempts too."""
        return self._now.spent_s(time.time())

    def note(self) -> float:
        """Notes that the attempt goes on; gives what ``spent_s`` does.

        Raises:
            RunError: The disk refuses.
        """
        now_s = time.time()
        with disk_errors(RunError, f"write {self._path}"), atomic_file(self._path, durable=False) as file:
            file.write(json.dumps(asdict(self._now) | {"seen_unix_s": now_s}).encode() + b"\n")
        return self._now.spent_s(now_s)


def num_starts(path: Path) -> int:
    """How often a run has begun, by its ``gpu_time.json``, whoever started it; 0 where that cannot be read."""
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        return int(json.loads(path.read_text(encoding="utf-8"))["attempt"])
    return 0


def _read(path: Path) -> GpuTime | None:
    with suppress(FileNotFoundError):
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            numbers = [float(values[name]) for name in ("started_unix_s", "seen_unix_s", "earlier_s")]
            return GpuTime(int(values["attempt"]), int(values["num_ranks"]), *numbers)
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, FileNotFoundError):
                raise
            get_logger(__name__).warning("%s cannot be read (%s): GPU time counts from this start on", path, error)
    return None
