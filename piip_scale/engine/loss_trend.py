"""Where a rank's loss has been lately, and above what it is an accident."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping

from piip_scale.config.run import TrainConfig
from piip_scale.engine.step import LARGEST_LOSS
from piip_scale.telemetry.records import total_of


class LossTrend:
    """The running median of one rank's loss over its last applied steps. Not collective.

    Ranks judge their own losses by their own medians: what one of them refuses reaches the others with the gradients.

    Args:
        train: ``max_loss_ratio`` and ``loss_trend_steps`` of it.
    """

    def __init__(self, train: TrainConfig) -> None:
        self._ratio, self._steps = train.max_loss_ratio, train.loss_trend_steps
        self._losses: deque[float] = deque(maxlen=self._steps)

    @property
    def limit(self) -> float:
        """The largest loss, a mean over micro-batches, that the next step may have."""
        if self._ratio is None or len(self._losses) < self._steps:
            return LARGEST_LOSS
        median = statistics.median(self._losses)
        # Ratios say nothing of a loss that may be negative.
        return min(self._ratio * median, LARGEST_LOSS) if median > 0 else LARGEST_LOSS

    def add(self, losses: Mapping[str, float]) -> None:
        """Takes in an applied step's named losses."""
        if self._ratio is not None:
            self._losses.append(total_of(losses))
