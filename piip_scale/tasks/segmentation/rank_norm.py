"""Batch normalisation over the images of all ranks, on any device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import Self

from piip_scale.errors import ConfigError

_AXES = (0, 2, 3)


class RankBatchNorm(nn.SyncBatchNorm):
    """``SyncBatchNorm``, which torch has for accelerators alone, also for CPUs: there in plain operations.

    The released recipes train with it; and running statistics must be the same on every rank, for each evaluates its
    share of the images and only the first one's are saved. Statistics stay float32 whatever the dtype of the weights:
    a step of a hundredth is lost in bfloat16. In training every rank must call it.
    """

    def forward(self, maps: Tensor) -> Tensor:
        """Normalised maps, (B, C, H, W). Collective in training.

        Raises:
            ConfigError: Training on a single value a channel, which has no spread.
        """
        if not self.training:
            return super().forward(maps)
        num_ranks = dist.get_world_size() if dist.is_initialized() else 1
        if maps.numel() // maps.shape[1] * num_ranks == 1:
            raise ConfigError(
                "a step of one image cannot be normalised",
                rule="the heads pool it to one pixel, and a batch norm needs two",
                fix="raise data.micro_batch_size",
            )
        if num_ranks == 1:
            # SyncBatchNorm refuses a CPU's maps as soon as ranks have joined, also where there is only one.
            return super(nn.SyncBatchNorm, self).forward(maps)
        return self._by_hand(maps) if maps.device.type == "cpu" else super().forward(maps)

    def _by_hand(self, maps: Tensor) -> Tensor:
        count = torch.full((1,), maps.numel() / maps.shape[1], dtype=maps.dtype)
        sums = _over_ranks(torch.cat([maps.sum(_AXES), count]))
        mean, count = sums[:-1] / sums[-1], sums[-1].detach()
        centred = maps - mean.view(1, -1, 1, 1)
        variance = _over_ranks(centred.square().sum(_AXES)) / count
        self._track(mean.detach(), variance.detach() * count / (count - 1))
        scale = self.weight * (variance + self.eps).rsqrt()
        result: Tensor = centred * scale.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)
        return result

    def _track(self, mean: Tensor, variance: Tensor) -> None:
        buffers: dict[str, Any] = self._buffers
        buffers["num_batches_tracked"].add_(1)
        buffers["running_mean"].lerp_(mean, self.momentum)
        buffers["running_var"].lerp_(variance, self.momentum)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves as any module does; statistics keep their dtype."""
        super()._apply(fn, recurse)
        buffers: dict[str, Any] = self._buffers
        for name in ("running_mean", "running_var"):
            buffers[name] = buffers[name].float()
        return self


def _over_ranks(values: Tensor) -> Tensor:
    """The sum of a tensor over all ranks; its gradient is the sum of theirs. Collective, backward as well."""
    result: Tensor = _RankSum.apply(values)
    return result


class _RankSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return _summed(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:  # type: ignore[override]
        return _summed(gradients[0])


def _summed(values: Tensor) -> Tensor:
    total = values.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total
