"""Config of the levels that leave the network for a detector."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from piip_scale.config.base import Strict

_SCALES = (4.0, 2.0, 1.0, 0.5)
"""Sizes over the source's grid that a pyramid can make."""


class PyramidConfig(Strict):
    """What leaves the network for a detector.

    Attributes:
        kind: ``simple`` makes every level of the features after the last stage; ``regular`` takes each level after a
            stage of its own, as networks with ConvNeXt branches do.
        scales: Each level's size over the highest-resolution branch's grid (after the level's stage). In a simple
            pyramid largest first: with patches of 16 px, 4, 2, 1, 0.5 are strides 4, 8, 16, 32.
        stages: Of a regular pyramid, the stage (0-based) after which each level is taken; the last stage comes last.
        norm: Between the two doublings of a level of scale 4; the single-branch baselines use ``layernorm``.
    """

    kind: Literal["simple", "regular"] = "simple"
    scales: tuple[float, ...] = _SCALES
    stages: tuple[Annotated[int, Field(ge=0)], ...] = ()
    norm: Literal["groupnorm", "layernorm"] = "groupnorm"

    @model_validator(mode="after")
    def _levels_agree(self) -> PyramidConfig:
        scales, stages = list(self.scales), list(self.stages)
        if not set(scales) <= set(_SCALES):
            raise ValueError(f"scales={scales} must be among {list(_SCALES)}")
        if self.kind == "simple" and (not scales or scales != sorted(set(scales), reverse=True)):
            raise ValueError(f"scales={scales} must fall strictly and name at least one level")
        if self.kind == "simple" and stages:
            raise ValueError(f"stages={stages} belong to a regular pyramid: set kind to regular, or leave them out")
        if self.kind == "regular" and (not stages or len(stages) != len(scales) or stages != sorted(set(stages))):
            raise ValueError(f"stages={stages} must rise strictly and name one stage for each of scales={scales}")
        return self
