"""What a run shows beside its numbers."""

from __future__ import annotations

from pydantic import model_validator

from piip_scale.config.base import NonNegative, Strict


class TelemetryConfig(Strict):
    """What a run shows beside its numbers.

    Attributes:
        pictures: Validation images that each evaluation of a training draws, the truth beside what is found, always
            the same: so many, evenly spread over the set, or those of these keys; 0 for none.
    """

    pictures: NonNegative | tuple[str, ...] = 4

    @model_validator(mode="after")
    def _each_picture_once(self) -> TelemetryConfig:
        if isinstance(self.pictures, tuple) and len(set(self.pictures)) < len(self.pictures):
            raise ValueError(f"pictures={self.pictures!r} must name each sample once")
        return self
