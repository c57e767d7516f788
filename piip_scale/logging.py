"""One logger for the package: rank 0 speaks, other ranks only when something is wrong."""

from __future__ import annotations

import logging
import sys

_ROOT = "piip_scale"


def get_logger(name: str = _ROOT) -> logging.Logger:
    """The package's logger, or the child that belongs to a module (pass ``__name__``)."""
    return logging.getLogger(name if name.startswith(_ROOT) else f"{_ROOT}.{name}")


def configure_logging(rank: int = 0, level: int = logging.INFO) -> None:
    """Sends the package's messages to standard error; ranks above 0 send warnings and worse only.

    Every rank calls it once, at its start; a second call replaces the first.
    """
    logger = logging.getLogger(_ROOT)
    handler = _StandardError()
    prefix = "" if rank == 0 else f"[rank {rank}] "
    handler.setFormatter(logging.Formatter(f"{prefix}%(message)s"))
    logger.handlers[:] = [handler]
    logger.setLevel(level if rank == 0 else logging.WARNING)
    logger.propagate = False


class _StandardError(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to what is ``sys.stderr`` at the time: a progress bar puts itself there, and prints above itself."""

    def emit(self, record: logging.LogRecord) -> None:
        """Writes one record."""
        # Not by setStream, which flushes the stream before: that may be closed, and each record was flushed already.
        self.stream = sys.stderr
        super().emit(record)
