"""One optimiser step: losses, gradients, update, unless something in it is not finite."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from piip_scale.data.batch import Batch
from piip_scale.engine.phases import PassClock
from piip_scale.engine.zero.deepspeed_api import Engine, skip_step
from piip_scale.engine.zero.message_clock import MESSAGES
from piip_scale.engine.zero.setup import gather_residents
from piip_scale.errors import ModelError
from piip_scale.world import World

LARGEST_LOSS: float = torch.finfo(torch.float32).max
"""Of a loss that is finite."""


@dataclass(frozen=True)
class StepResult:
    """What one step did.

    Attributes:
        losses: This rank's named losses, means over its micro-batches, detached scalars on its device.
        host_losses: The same as numbers, on their way to the host since before the update: reading them does not wait
            for that.
        grad_norm: Norm of the whole gradient before clipping, the same on every rank; infinite where it was not finite.
        applied: Whether the weights moved, the same on every rank.
        sizes_px: Height and width of the network's input for each image of this rank.
        forward_seconds: Of its micro-batches' forward passes, on the device.
        backward_seconds: Of their backward passes, on the device.
        message_seconds: How long computing stood still for messages; ``None`` where that is not measured, as on one
            rank.
        real_px: Pixels of its images, those that pad them to their batch's size left out.
    """

    losses: dict[str, Tensor]
    host_losses: dict[str, float]
    grad_norm: float
    applied: bool
    sizes_px: tuple[tuple[int, int], ...]
    forward_seconds: float = 0.0
    backward_seconds: float = 0.0
    message_seconds: float | None = None
    real_px: int = 0

    @property
    def images(self) -> int:
        """Images of this rank."""
        return len(self.sizes_px)


def seed_step(seed: int, *position: int) -> None:
    """Sets all random generators from the seed and a position, so that resuming needs no generator state.

    Args:
        seed: The run's seed.
        position: Step, and micro-batch among those of all ranks.
    """
    seeds = np.random.SeedSequence([seed % 2**32, *position]).generate_state(2, np.uint64)
    torch.manual_seed(int(seeds[0]) >> 1)  # also seeds every GPU
    np.random.seed(int(seeds[1]) % 2**32)
    random.seed(int(seeds[1]))


def train_step(
    engine: Engine, batches: Iterable[Batch], step: int, seed: int, world: World, max_loss_sum: float = LARGEST_LOSS
) -> StepResult:
    """Runs the step's micro-batches forward and backward, then the optimiser. Collective.

    A step with a loss or a gradient that is not finite, or too large a loss, changes nothing, on any rank. Random
    numbers belong to a micro-batch, whichever rank computes it.

    Args:
        engine: The engine; its groups already have this step's rates.
        batches: This rank's micro-batches, as many as the engine accumulates, on its device.
        step: Index of the step.
        seed: The run's seed.
        world: This rank among all.
        max_loss_sum: Of this rank, summed over its micro-batches; may differ among ranks.

    Raises:
        ModelError: The model returned no loss.
    """
    sums: dict[str, Tensor] = {}
    loss_sum: Tensor | float = 0.0
    sizes_px: list[tuple[int, int]] = []
    real_px = 0
    clock = PassClock()
    for micro, batch in enumerate(batches):
        if micro:
            engine.step()
        seed_step(seed, step, micro * world.num_ranks + world.rank)
        device = batch.images_BHWC.device
        clock.mark(device)
        losses: dict[str, Tensor] = engine(batch)
        clock.mark(device)
        loss = total_loss(losses)
        loss_sum = loss_sum + loss.detach()
        engine.backward(_poisoned(loss, loss_sum, max_loss_sum))
        clock.mark(device)
        for name, value in losses.items():
            sums[name] = sums.get(name, 0.0) + value.detach()
        sizes_px += [(batch.images_BHWC.shape[1], batch.images_BHWC.shape[2])] * len(batch)
        real_px += sum(math.prod(info.size_px) for info in batch.infos)
    means = torch.stack([value.float().reshape(()) for value in sums.values()]) / (micro + 1)
    on_host = means.to("cpu", non_blocking=True)
    norm = _update(engine)
    # The host has waited for the norm, and so for the last mark.
    forward_seconds, backward_seconds = clock.seconds()
    return StepResult(
        losses=dict(zip(sums, means, strict=True)),
        # Complete by now: the norm was launched after this copy, and the host has waited for it.
        host_losses=dict(zip(sums, on_host.tolist(), strict=True)),
        grad_norm=norm,
        applied=math.isfinite(norm) and engine.was_step_applied(),
        sizes_px=tuple(sizes_px),
        forward_seconds=forward_seconds,
        backward_seconds=backward_seconds,
        message_seconds=MESSAGES.take(),
        real_px=real_px,
    )


def total_loss(losses: Mapping[str, Tensor]) -> Tensor:
    """Sum of the losses proper, those whose name holds ``loss``.

    Raises:
        ModelError: There is none.
    """
    proper = [value for name, value in losses.items() if "loss" in name]
    if not proper:
        raise ModelError("the model returned no loss", value=sorted(losses), rule="a name with 'loss' in it")
    return torch.stack([value.reshape(()) for value in proper]).sum()


def _poisoned(loss: Tensor, loss_sum: Tensor, max_loss_sum: float) -> Tensor:
    """The loss, or NaN with NaN gradients where the sum with it is not finite or too large.

    The gradient reduction carries it to every rank: that spares a collective and, on a GPU, a wait for the device;
    alone it would not, since an infinite loss can have finite gradients.
    """
    return loss * torch.where(loss_sum.abs() <= max_loss_sum, 1.0, math.nan)


def _update(engine: Engine) -> float:
    """Ends the step's last micro-batch and updates the weights; returns the norm of the gradient. Waits for the device.

    ZeRO looks at the gradients itself and leaves the weights alone where one is not finite. Without ZeRO nobody does:
    there the gradients are reduced and whole at this point, so every rank sees the same norm.
    """
    if engine.zero_optimization_stage() > 0:
        engine.step()
        norm = float(engine.get_global_grad_norm() or 0.0)
        if not math.isfinite(norm):
            gather_residents(engine)
        return norm
    norm = nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None]).item()
    if math.isfinite(norm):
        engine.step()
        return norm
    skip_step(engine)
    return math.inf
