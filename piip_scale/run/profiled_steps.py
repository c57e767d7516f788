"""The steps of an attempt that are profiled, as a command line names them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from piip_scale.errors import ConfigError

FIRST_POSSIBLE = 3
"""An attempt's first step is like no other, and the one before those profiled is the profiler's warm-up."""
MOST_STEPS = 5
"""Of one profile: a step of a large model is some 100,000 events, which all are in memory at once."""

_STEPS = re.compile(r"(\d{1,9})(?:-(\d{1,9}))?")


@dataclass(frozen=True)
class ProfiledSteps:
    """Steps that are profiled, counted from 1 since their attempt began.

    Attributes:
        first: The first.
        last: The last.
    """

    first: int
    last: int

    def __str__(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"

    @property
    def words(self) -> str:
        """As a sentence names them."""
        return f"step {self.first}" if self.first == self.last else f"steps {self.first} to {self.last}"

    def until(self, steps_before: int, *everies: int) -> int:
        """The last step whose profile has nothing but steps in it: evaluations and saves come after it.

        Args:
            steps_before: Of the run, done before the attempt.
            everies: Each so many steps of the run one of these comes; 0 for never.

        Returns:
            It, counted since the attempt began: ``last`` or an earlier one.
        """
        steps = range(self.first, self.last)
        return next(
            (n for n in steps if any(every and (steps_before + n) % every == 0 for every in everies)), self.last
        )


def parse_profiled_steps(text: str) -> ProfiledSteps | None:
    """``10`` or ``10-12``; ``None`` for an empty text.

    Raises:
        ConfigError: It is neither, too early, backwards or too many.
    """
    if not text:
        return None
    match = _STEPS.fullmatch(text)
    first = int(match[1]) if match else 0
    last = int(match[2] or match[1]) if match else 0
    if not FIRST_POSSIBLE <= first <= last < first + MOST_STEPS:
        raise ConfigError(
            "--profile",
            value=text,
            rule=f"a step of the attempt or a range of at most {MOST_STEPS}, from step {FIRST_POSSIBLE} on: the first "
            "step is like no other, and the one before those profiled warms up",
            fix="write 10 or 10-12",
        )
    return ProfiledSteps(first, last)
