"""Config of how often each training image comes in an epoch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from piip_scale.config.base import Strict


class SamplingConfig(Strict):
    """How often each training image comes in an epoch, where that is not once.

    Attributes:
        kind: ``repeat_factor``: images of rare classes come more often. A class that a share f of the images has asks
            for sqrt(threshold / f) of each, an image takes the largest of its classes and at least 1, and fractions are
            rounded by chance, anew in each epoch. All epochs have one length.
        threshold: t; LVIS's is 0.001.
    """

    kind: Literal["repeat_factor"]
    threshold: Annotated[float, Field(gt=0, le=1)] = 0.001
