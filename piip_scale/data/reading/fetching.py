"""Fetching whole files from a source that may fail: tried again, with growing pauses, and held to their checksum."""

from __future__ import annotations

import hashlib
import io
import platform
import zlib
from dataclasses import dataclass
from typing import BinaryIO

from piip_scale.data.reading.sources import (
    MOST_UNSIZED_BYTES,
    NEVER,
    Source,
    SpoiltError,
    Stop,
    StoppedError,
    TransferError,
)
from piip_scale.errors import FetchError
from piip_scale.logging import get_logger

FIRST_PAUSE_S = 0.5
"""Roughly the pause after a first failure."""

_LONGEST_PAUSE_S = 30.0
# Something on the way may have spoilt what came, once; what comes spoilt again and again lies there like that.
_SPOILT_TRIES = 3
# A single failure is what networks do; from here on a user may want to know why nothing moves.
_REPORTED_FAILURES = 2


@dataclass(frozen=True)
class Fetcher:
    """Fetches the files of one set.

    Attributes:
        source: Where they are.
        retries: Further tries after one that failed without bringing anything new.
        most_unsized_bytes: Of a file whose length nothing states.
    """

    source: Source
    retries: int
    most_unsized_bytes: int = MOST_UNSIZED_BYTES

    def read(self, name: str, sha256: str | None = None, stop: Stop = NEVER) -> bytes:
        """A small file, held to its checksum where that is known.

        Raises:
            FetchError: It did not come.
            StoppedError: ``stop`` was set.
        """
        file = io.BytesIO()
        self.fetch(name, file, None, sha256, stop)
        return file.getvalue()

    def fetch(
        self, name: str, file: BinaryIO, num_bytes: int | None, sha256: str | None = None, stop: Stop = NEVER
    ) -> None:
        """Writes a file of the set into ``file``, from its start.

        Raises:
            FetchError: It did not come, or not as the manifest describes it.
            StoppedError: ``stop`` was set.
        """
        download = _Download(self.source, name, file, num_bytes, sha256, self.most_unsized_bytes)
        tries = failures = spoilt = 0
        while True:
            before, tries = download.farthest, tries + 1
            try:
                return download.go_on(stop)
            except TransferError as error:
                failures = 1 if download.farthest > before else failures + 1
                spoilt += isinstance(error, SpoiltError)
                is_final = error.is_final or spoilt >= _SPOILT_TRIES
                if is_final or failures > self.retries:
                    raise self._given_up(name, tries, str(error), is_final=is_final) from error
                pause = pause_s(failures, f"{platform.node()} {name}")
                if failures >= _REPORTED_FAILURES:
                    get_logger(__name__).warning(
                        "%s from %s: %s; trying again in %.1f s", name, self.source.location, error, pause
                    )
                if stop.wait(pause):
                    raise StoppedError from None

    def _given_up(self, name: str, tries: int, reason: str, *, is_final: bool) -> FetchError:
        failed = FetchError(
            f"{name} cannot be fetched from {self.source.location}",
            value=reason,
            rule="" if tries == 1 else f"{tries} tries",
            fix="check the location, and that the set there is whole" if is_final else "start again once it answers",
        )
        failed.is_final = is_final
        return failed


def pause_s(failures: int, key: str) -> float:
    """How long to wait after so many failures in a row.

    Doubles up to half a minute; less by up to a half, the same for the same key, so that many who failed together do
    not come back together.
    """
    spread = zlib.crc32(f"{key} {failures}".encode()) / 2**32
    # The exponent is held down, since a float has no room for the pauses of a thousand failures.
    return min(FIRST_PAUSE_S * 2.0 ** min(failures - 1, 30), _LONGEST_PAUSE_S) * (1 - spread / 2)


class _Download:
    """A file on its way; what came stays when a try fails, where the source can go on from there.

    Attributes:
        farthest: Bytes that came in the best try so far.
    """

    def __init__(
        self, source: Source, name: str, file: BinaryIO, num_bytes: int | None, sha256: str | None, most_unsized: int
    ) -> None:
        self._source, self._name, self._file = source, name, file
        self._num_bytes, self._sha256, self._most_unsized = num_bytes, sha256, most_unsized
        self.farthest = 0
        self._restart()

    def go_on(self, stop: Stop) -> None:
        """Fetches what is missing, and checks the whole."""
        if not self._source.resumes or self._num_bytes is None:
            self._restart()
        for block in self._source.stream(self._name, self._done, self._num_bytes, stop):
            if self._num_bytes is not None and self._done + len(block) > self._num_bytes:
                self._spoilt(f"more than its {self._num_bytes} bytes came")
            if self._num_bytes is None and self._done + len(block) > self._most_unsized:
                mib = self._most_unsized / (1 << 20)
                reason = f"more than {mib:g} MiB came of it, the most that data.cache.max_unsized_mib allows"
                raise TransferError(reason, is_final=True)
            self._file.write(block)
            self._digest.update(block)
            self._done += len(block)
            self.farthest = max(self.farthest, self._done)
        if self._num_bytes is not None and self._done < self._num_bytes:
            self._spoilt(f"only {self._done} of its {self._num_bytes} bytes came")
        if self._sha256 is not None and self._digest.hexdigest() != self._sha256:
            self._spoilt("its SHA-256 is not the manifest's")

    def _spoilt(self, reason: str) -> None:
        self._restart()
        raise SpoiltError(reason)

    def _restart(self) -> None:
        self._file.seek(0)
        self._digest, self._done = hashlib.sha256(), 0
