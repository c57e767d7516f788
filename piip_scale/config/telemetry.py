"""What a run shows beside its numbers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from piip_scale.config.base import NonNegative, Strict


class TelemetryConfig(Strict):
    """What a run shows beside its numbers.

    Attributes:
        trackers: Where curves and pictures go beside the run's own files, by packages that are installed: ``wandb``,
            ``mlflow``.
        project: What the run belongs to there.
        pictures: Validation images that each evaluation of a training draws, the truth beside what is found, always
            the same: so many, evenly spread over the set, or those of these keys; 0 for none.
    """

    trackers: tuple[Literal["wandb", "mlflow"], ...] = ()
    project: Annotated[str, Field(min_length=1)] = "piip_scale"
    pictures: NonNegative | tuple[str, ...] = 4

    @model_validator(mode="after")
    def _each_name_once(self) -> TelemetryConfig:
        for key, names in (("pictures", self.pictures), ("trackers", self.trackers)):
            if isinstance(names, tuple) and len(set(names)) < len(names):
                raise ValueError(f"{key}={names!r} must name each once")
        return self
