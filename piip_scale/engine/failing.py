"""The last words of a rank: each error told once, whoever meets it."""

from __future__ import annotations

from contextlib import suppress

from piip_scale.engine.run_dir import RunDirectory, error_line
from piip_scale.errors import PiipError
from piip_scale.logging import get_logger


def tell_failure(run: RunDirectory, rank: int, error: BaseException, details: str = "") -> int:
    """Records an error; the first rank that does tells the user in one line, and the status.

    Args:
        run: The run's directory.
        rank: This rank.
        error: What ends it.
        details: What goes below the traceback in ``errors/``.

    Returns:
        The exit code to end with.
    """
    if run.record_error(rank, error, details):
        shown = isinstance(error, PiipError) and not details
        where = "" if shown else f" ({'details' if details else 'traceback'}: {run.errors / f'rank_{rank}.txt'})"
        get_logger(__name__).error("piip-scale: error: %s%s", error_line(error), where)
        # Where the disk is what failed, the status cannot be written either, and one line has been said.
        with suppress(PiipError):
            run.write_failure(error)
    return error.exit_code if isinstance(error, PiipError) else 1
