"""The last report of a rank: each error reported once, whoever meets it."""

from __future__ import annotations

from contextlib import suppress

from piip_scale.errors import PiipError
from piip_scale.logging import get_logger
from piip_scale.run.run_dir import RunDirectory


def report_failure(run: RunDirectory, rank: int, error: BaseException, step: int = 0) -> int:
    """Records an error; the first rank that does reports it to the user in one line, and to the status.

    Args:
        run: The run's directory.
        rank: This rank.
        error: What ends it.
        step: Optimiser steps behind it.

    Returns:
        The exit code to end with.
    """
    ending = run.record_error(rank, error, step)
    if ending:
        more = ("details" if error.details else "") if isinstance(error, PiipError) else "traceback"
        where = f" ({more}: {run.errors / f'rank_{rank}.txt'})" if more else ""
        get_logger(__name__).error("piip-scale: error: %s%s", ending.line, where)
        # Where the disk is what failed, the status cannot be written either, and one line has been logged.
        # A run that never began stays none: its next start needs no --resume.
        with suppress(PiipError):
            if run.status():
                run.write_failure(ending)
    return error.exit_code if isinstance(error, PiipError) else 1
