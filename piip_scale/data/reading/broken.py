"""Samples that cannot be used: reported once in a run, whichever rank meets them, and only so many of them."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from piip_scale.data.reading.files import sha256_of
from piip_scale.errors import DataError
from piip_scale.logging import get_logger


@dataclass(frozen=True)
class BrokenSample:
    """A sample that could not be used, and why."""

    key: str
    reason: str


class BrokenSamples:
    """The samples of a set that were found broken.

    Args:
        location: Of the set.
        limit: More of them are too many.
        folder: A file for each, of all ranks and all starts of a run; ``None`` keeps them in this process alone.
        done: What becomes of one, for the log.
    """

    def __init__(
        self, location: str, limit: float, folder: Path | None = None, done: str = "is replaced by a neighbour"
    ) -> None:
        self._location, self._limit, self._folder, self._done = location, limit, folder, done
        self._met: set[str] = set()

    def add(self, sample: BrokenSample) -> None:
        """Reports a sample, unless another rank has.

        Raises:
            DataError: There are too many.
        """
        if sample.key in self._met:
            return
        self._met.add(sample.key)
        if self._is_first_to_write(sample):
            get_logger(__name__).warning("sample %s %s: %s", sample.key, self._done, sample.reason)
        if len(self) > self._limit:
            raise DataError(
                f"too many broken samples in {self._location}, the last {sample.key}",
                value=len(self),
                rule=f"at most {self._limit:.6g}, by data.max_broken_share",
                fix="pack the set again, or raise the share",
            )

    def __len__(self) -> int:
        written = 0 if self._folder is None else sum(1 for _ in self._folder.glob("*.json"))
        return max(len(self._met), written)

    def _is_first_to_write(self, sample: BrokenSample) -> bool:
        if self._folder is None:
            return True
        path = self._folder / f"{sha256_of(sample.key.encode())[:16]}.json"
        # A disk that is full or read-only must not end the run, nor keep this sample's name from the user.
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            # To create a file that must not exist is what shared file systems let only one of many do.
            try:
                file = path.open("x", encoding="utf-8")
            except FileExistsError:
                return False
            with file:
                json.dump(asdict(sample), file)
        return True
