"""Times as people read them at a glance."""

from __future__ import annotations

_MINUTE_S, _HOUR_S, _DAY_S = 60, 3600, 86400


def duration(seconds: float) -> str:
    """A time to go, to two units: ``3d 4h``, ``5h 20m``, ``12m``, ``40s``."""
    if seconds < _MINUTE_S:
        return f"{seconds:.0f}s"
    if seconds < _HOUR_S:
        return f"{seconds / _MINUTE_S:.0f}m"
    if seconds < _DAY_S:
        return f"{int(seconds // _HOUR_S)}h {int(seconds % _HOUR_S // _MINUTE_S):02d}m"
    return f"{int(seconds // _DAY_S)}d {int(seconds % _DAY_S // _HOUR_S):02d}h"
