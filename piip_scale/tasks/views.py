"""Several views of each image in testing: at other scales, and mirrored."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from piip_scale.config.run import RunConfig
from piip_scale.data.batch import Batch
from piip_scale.errors import ConfigError

BatchT = TypeVar("BatchT", bound=Batch)


@dataclass(frozen=True)
class Views:
    """What each image is looked at as.

    Attributes:
        scales: Factors on the size that the config gives to images.
        flip: Mirrored, too.
        most: Objects that are kept of an image, once those of all views are merged.
    """

    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    most: int = 100

    @property
    def is_one(self) -> bool:
        """Whether there is nothing to merge."""
        return self.scales == (1.0,) and not self.flip

    @property
    def flips(self) -> tuple[bool, ...]:
        """Of the views of one scale."""
        return (False, True) if self.flip else (False,)

    def configs(self, config: RunConfig) -> list[RunConfig]:
        """The config of each scale.

        Raises:
            ConfigError: The task's images have one size.
        """
        return [config if scale == 1 else _scaled(config, scale) for scale in self.scales]


def _scaled(config: RunConfig, scale: float) -> RunConfig:
    augment: Any = getattr(config.data, "augment")  # noqa: B009 - each task's data have their own
    if not hasattr(augment, "short_edge_px"):
        raise ConfigError(
            "--scales", value=scale, rule="a classifier's images have the one size of its network", fix="leave it out"
        )
    short = augment.short_edge_px
    # Of several candidates evaluation takes the last.
    edges = round(short * scale) if isinstance(short, int) else (round(short[-1] * scale),)
    changed = augment.model_copy(update={"short_edge_px": edges, "max_edge_px": round(augment.max_edge_px * scale)})
    return config.model_copy(update={"data": config.data.model_copy(update={"augment": changed})})


def mirrored(batch: BatchT) -> BatchT:
    """A batch with each image mirrored left to right in its own place; what is known of it stays as it was."""
    images = batch.images_BHWC.clone()
    for image, info in zip(images, batch.infos, strict=True):
        height, width = info.size_px
        image[:height, :width] = torch.flip(image[:height, :width], [1])
    return replace(batch, images_BHWC=images)
