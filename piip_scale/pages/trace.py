"""A curve of any length in bounded memory: means with the extremes around them."""

from __future__ import annotations

import math
from dataclasses import dataclass

MOST_SPANS = 240
"""More of them cannot be told apart in a chart."""
# Sums and squares of such values are infinite.
_TOO_LARGE = 1e100


@dataclass
class Span:
    """Neighbouring points as one.

    Attributes:
        first_x: Of its first point.
        last_x: Of its last.
        low: Its smallest value.
        high: Its largest.
        total: Their sum.
        count: How many.
        after_gap: It does not go on from the one before: there are values between that are no numbers.
    """

    first_x: float
    last_x: float
    low: float
    high: float
    total: float
    count: int = 1
    after_gap: bool = False

    @property
    def x(self) -> float:
        """Its middle."""
        return (self.first_x + self.last_x) / 2

    @property
    def mean(self) -> float:
        """Of its values."""
        return self.total / self.count

    def joined(self, later: Span) -> Span:
        """Both as one; a gap between them is forgotten."""
        return Span(
            self.first_x,
            later.last_x,
            min(self.low, later.low),
            max(self.high, later.high),
            self.total + later.total,
            self.count + later.count,
            self.after_gap,
        )


class Trace:
    """Takes points in order, and keeps at most ``MOST_SPANS`` spans of them, no extreme lost.

    Attributes:
        spans: So far.
        last: The last value, finite or not; NaN before it.
        gaps: Where values were that are no finite numbers, by x; the first ``MOST_SPANS``.
        num_gaps: How many there were.
    """

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.last = math.nan
        self.gaps: list[float] = []
        self.num_gaps = 0
        self._points_per_span = 1
        self._has_gap = False

    def add(self, x: float, value: float) -> None:
        """One more point; a value that is not finite leaves a gap."""
        self.last = value
        if not abs(value) < _TOO_LARGE:
            self.num_gaps += 1
            self._has_gap = True
            if len(self.gaps) < MOST_SPANS:
                self.gaps.append(x)
            return
        before = self.spans[-1] if self.spans else None
        # What went back was done again, and is another line.
        self._has_gap |= before is not None and x < before.last_x
        span = Span(x, x, value, value, value, after_gap=self._has_gap and before is not None)
        if before is not None and before.count < self._points_per_span and not span.after_gap:
            self.spans[-1] = before.joined(span)
        else:
            self.spans.append(span)
        self._has_gap = False
        if len(self.spans) > MOST_SPANS:
            self._halve()

    def _halve(self) -> None:
        self._points_per_span *= 2
        pairs = zip(self.spans[::2], self.spans[1::2], strict=False)
        odd = self.spans[-1:] if len(self.spans) % 2 else []
        self.spans = [one.joined(other) for one, other in pairs] + odd

    @property
    def low(self) -> float:
        """The smallest value; infinite without any."""
        return min((span.low for span in self.spans), default=math.inf)

    @property
    def high(self) -> float:
        """The largest value; minus infinite without any."""
        return max((span.high for span in self.spans), default=-math.inf)
