"""Images in the statistics that a branch was pretrained with, where these are not the run's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from piip_scale.config.branches import BranchConfig, Statistics


@dataclass(frozen=True)
class Recolouring:
    """From one mean and deviation of pixels to another: an affine map of each channel, which resizing commutes with.

    Attributes:
        factors: Of each channel.
        offsets: Added after that.
    """

    factors: Statistics
    offsets: Statistics

    def __call__(self, image_BCHW: Tensor) -> Tensor:
        """Images (B, 3, H, W) in the other statistics, in their own dtype.

        Padding, 0 before, is the first statistics' mean colour in the others after it.
        """
        # Numbers, not tensors: none has to be brought to the device, and a model on the meta device has none to lose.
        channels = zip(image_BCHW.unbind(1), self.factors, self.offsets, strict=True)
        return torch.stack([channel * factor + offset for channel, factor, offset in channels], 1)


def recolouring(branch: BranchConfig, mean: Statistics, std: Statistics) -> Recolouring | None:
    """What brings images normalised by a mean and a deviation to a branch's own; ``None`` where it has no others.

    Args:
        branch: The branch.
        mean: What was subtracted from the images' channels, 0 to 255.
        std: What divided them after that.
    """
    if branch.mean is None or branch.std is None or (branch.mean, branch.std) == (mean, std):
        return None
    red, green, blue = (
        (before / after, (middle - own) / after)
        for middle, before, own, after in zip(mean, std, branch.mean, branch.std, strict=True)
    )
    return Recolouring(*zip(red, green, blue, strict=True))
