"""The supervisor's lines in a job's log, marked apart from those of the ranks."""

from __future__ import annotations

import time

from piip_scale.logging import get_logger


def log_line(line: str) -> None:
    """One line with the time."""
    get_logger(__name__).info("%s supervise: %s", time.strftime("%Y-%m-%d %H:%M:%S"), line)
