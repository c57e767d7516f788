"""Sentences on what is wrong with a run while it goes on: said when it begins, known until it is over."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from piip_scale.run.warned import LASTS_STEPS, Warned
from piip_scale.telemetry.records import IntervalRecord, RankPace

# Intervals in a row: one may be slow for any reason.
_SOON, _LONG = 3, 20
# Whoever looks once a day sees what happened since.
_DAY_S = 86400.0
_STARVED_SHARE = 0.25
# A rank's own time over the fastest one's, and the share of a step that others then wait.
_MUCH_SLOWER = 1.5
_LOST_SHARE = 0.2
_DEAD_GRADIENT, _DEAD_GAMMA = 1e-6, 1e-6


@dataclass(frozen=True)
class Incident(Warned):
    """What went wrong once.

    Attributes:
        unix_time_s: When.
    """

    unix_time_s: float


class Health:
    """Watches the intervals of one process, and keeps what went wrong once for a day.

    Args:
        incidents: Of earlier processes.
    """

    def __init__(self, incidents: Iterable[Incident] = ()) -> None:
        self._in_a_row: Counter[str] = Counter()
        self._calm: Counter[str] = Counter()
        self._lasting: dict[str, Warned] = {}
        self._incidents = list(incidents)

    def lines(self, step: int, record: IntervalRecord) -> list[str]:
        """What is to be said now, one sentence each; what was said is repeated only once it was over."""
        found = {key: (patience, text) for key, patience, text in _troubles(record)}
        self._in_a_row = Counter({key: self._in_a_row[key] + 1 for key in found})
        self._calm = Counter({key: self._calm[key] + 1 for key in self._lasting if key not in found})
        self._lasting = {key: warned for key, warned in self._lasting.items() if self._calm[key] < LASTS_STEPS}
        due = [key for key, (patience, _) in found.items() if self._in_a_row[key] >= patience]
        new = [key for key in due if key not in self._lasting]
        for key in found:
            if key in self._lasting or key in new:
                since = self._lasting[key].step if key in self._lasting else step
                self._lasting[key] = Warned(since, found[key][1])
        return [found[key][1] for key in new]

    def add(self, incident: Incident) -> None:
        """Something went wrong once."""
        self._incidents.append(incident)

    def warnings(self, now_unix_s: float) -> list[Warned]:
        """What is wrong, the first found first; then the last incident of a day, and how many there were."""
        self._incidents = [each for each in self._incidents if now_unix_s - each.unix_time_s < _DAY_S]
        found = list(self._lasting.values())
        if self._incidents:
            last, number = self._incidents[-1], len(self._incidents)
            found.append(Warned(last.step, last.text + f" (the last of {number} within a day)" * (number > 1)))
        return found


def _troubles(record: IntervalRecord) -> Iterator[tuple[str, int, str]]:
    """Key, patience in intervals, and sentence of all that is wrong in an interval."""
    if record.data_wait_share >= _STARVED_SHARE:
        yield (
            "data",
            _SOON,
            f"steps wait for data {record.data_wait_share:.0%} of their time: more data.workers, shards nearer to the "
            "GPUs or smaller images help",
        )
    if record.slowest and record.fastest and _is_straggler(record, record.slowest, record.fastest):
        slow, fast = record.slowest, record.fastest
        own_ms, fast_ms = slow.own_seconds * 1e3, fast.own_seconds * 1e3
        waits = f", {slow.wait_seconds * 1e3:.0f} of them for data" if slow.wait_seconds > slow.own_seconds / 2 else ""
        yield (
            f"rank {slow.rank}",
            _SOON,
            f"rank {slow.rank} on {slow.node} is slow, and the others wait for it: {own_ms:.0f} ms a step of its own"
            f"{waits}, where rank {fast.rank} on {fast.node} takes {fast_ms:.0f}",
        )
    yield from _dead_parts(record)


def _is_straggler(record: IntervalRecord, slow: RankPace, fast: RankPace) -> bool:
    lost_s = slow.own_seconds - fast.own_seconds
    return slow.own_seconds > _MUCH_SLOWER * fast.own_seconds and lost_s > _LOST_SHARE * record.step_seconds


def _dead_parts(record: IntervalRecord) -> Iterator[tuple[str, int, str]]:
    whole = sum(norm**2 for norm in record.gradient_norms.values()) ** 0.5
    for part, norm in record.gradient_norms.items():
        if norm <= _DEAD_GRADIENT * whole and whole > 0:
            yield (
                f"gradient of {part}",
                _LONG,
                f"{part} learns nothing: its gradient's norm is {norm:.1e}, of {whole:.1e} in all, and has been for "
                f"{_LONG} logged steps in a row",
            )
    for branch, gamma in record.gammas.items():
        if gamma <= _DEAD_GAMMA:
            yield (
                f"gamma of {branch}",
                _LONG,
                f"nothing flows into branch {branch}: the gammas of its interactions are {gamma:.1e} in the mean, and "
                f"have been for {_LONG} logged steps in a row",
            )
