"""Config of the units that join neighbouring branches."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from piip_scale.config.base import DropPathMode, Positive, Share, Strict


class InteractionConfig(Strict):
    """The units that join neighbouring branches after each stage.

    Attributes:
        num_stages: Stages, each of blocks and then units.
        direction: ``to_small`` lets only the smaller model of each pair receive: a larger one that is frozen then runs
            without a graph, and keeps no activations.
        attention: ``deform`` (deformable attention, one level) or ``cross`` (plain cross-attention).
        value_ratio: Width of the deformable attention's values over the query's width.
        ffn_ratio: Hidden width of the unit's feed-forward over the query's width; 0 leaves it out.
        projection: Project the other branch's features to the query's width first.
        gamma_init: Start of both residual scales; 0 makes every branch start as itself alone.
    """

    num_stages: Positive
    direction: Literal["both", "to_small"] = "both"
    attention: Literal["deform", "cross"] = "deform"
    num_heads: Positive = 16
    num_points: Positive = 4
    value_ratio: Annotated[float, Field(gt=0)] = 0.5
    ffn_ratio: Annotated[float, Field(ge=0)] = 0.25
    projection: bool = True
    norm: Literal["layernorm", "none"] = "layernorm"
    drop_path_rate: Share = 0.0
    drop_path_mode: DropPathMode = "zero"
    gamma_init: float = 0.0
    checkpoint_units: bool = False
