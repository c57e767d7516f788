"""ZeRO-3's update: every optimiser group stepped once.

DeepSpeed (0.19.8) updates sub-group by sub-group, each with a message for its norm, copies of its gradients and a step
through all optimiser groups: with layer decay, 132 times 132.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from piip_scale.engine.zero.deepspeed_api import Engine
from piip_scale.engine.zero.gradients import GradientSums
from piip_scale.engine.zero.message_clock import MESSAGES, time_gathers
from piip_scale.engine.zero.replicas import Replicas, replicas_of
from piip_scale.engine.zero.residents import Residents

# Torch's norm in float64 of float32 may copy what it is asked for, which would be twice the gradients at once.
_NORM_ELEMENTS = 2**20


def shorten_update(engine: Engine) -> None:
    """Has an engine of stage 3 do in an update what changes numbers, and no more. Not collective.

    Where DeepSpeed keeps optimiser state elsewhere, rounds gradients or divides them in another place, its own loop
    over sub-groups stays, and steps only the group that has parameters at the time.
    """
    optimizer = engine.optimizer
    if _is_plain(optimizer):
        replicas = replicas_of(engine)
        sums, residents = GradientSums(optimizer, replicas), Residents(engine)
        sums.attach()
        residents.attach(optimizer)
        optimizer.step = Update(optimizer, sums, residents, replicas).step
        time_gathers(engine, sums.total.device)
    else:
        _step_groups_with_parameters(optimizer.optimizer)


def mean_gradient(engine: Engine) -> Tensor | None:
    """This rank's slices of the last step's gradient, mean over ranks and clipped, as the update read them; live.

    float32, in the order of ``partitions``; ``None`` where another loop than ours updates.
    """
    update = getattr(engine.optimizer.step, "__self__", None)
    return update.gradient if isinstance(update, Update) else None


def _is_plain(optimizer: Any) -> bool:
    in_memory = not optimizer.offload_optimizer and not optimizer.params_in_nvme_and_cpu and not optimizer.offload_param
    exact = optimizer.gradient_accumulation_dtype == optimizer.master_weights_and_grads_dtype == torch.float32
    divides_once = optimizer.postscale_gradients and optimizer.gradient_predivide_factor == 1.0
    return bool(
        in_memory and exact and divides_once and optimizer.reduce_scatter and not optimizer.enable_sanity_checks
    )


class Update:
    """The update of all sub-groups at once. Collective.

    Args:
        optimizer: DeepSpeed's of stage 3.
        sums: Its gradients.
        residents: Its parameters that are whole on every rank.
        replicas: Where its ranks hold one of several copies.
    """

    def __init__(
        self, optimizer: Any, sums: GradientSums, residents: Residents, replicas: Replicas | None = None
    ) -> None:
        self._optimizer, self._sums, self._residents, self._replicas = optimizer, sums, residents, replicas
        self._masters: list[Tensor] = optimizer.fp32_partitioned_groups_flat
        self._members: dict[int, list[Tensor]] = defaultdict(list)
        for sub_group, master in enumerate(self._masters):
            self._members[optimizer.sub_group_to_group_id[sub_group]].append(master)

    @property
    def gradient(self) -> Tensor:
        """This rank's slices end to end, until the next backward pass; see ``mean_gradient``."""
        return self._sums.total

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """In the place of the optimiser's own ``step``: moves the weights, unless the gradient is not finite.

        Waits for the device once, to know whether it is.
        """
        optimizer = self._optimizer
        optimizer._pre_step()
        self._residents.cut_others()
        norm = self._norm()
        optimizer.overflow = not math.isfinite(norm)
        if optimizer._loss_scale_update_and_overflow_cleanup():
            return
        optimizer._global_grad_norm = norm
        self._scale_gradients(norm)
        self._step_every_group()
        self._copy_to_weights()
        with MESSAGES.still(self._sums.total.device):
            self._residents.gather(changed_by_update=True)
        optimizer.invalidate_secondary_tensor()

    def _norm(self) -> float:
        """Of the mean of all ranks' gradients; in float64 like DeepSpeed's."""
        parts = list(self._sums.total.split(_NORM_ELEMENTS))
        square = torch.stack(torch._foreach_norm(parts, 2, dtype=torch.float64)).square().sum()
        with MESSAGES.still(square.device):
            if self._replicas is None:
                dist.all_reduce(square, group=self._optimizer.dp_process_group)
            else:
                # One message for all, or replicas that add in another order would clip by other last digits and part.
                dist.all_reduce(square if self._replicas.replica == 0 else square.zero_())
        return math.sqrt(square.item()) / self._sums.num_summed

    def _scale_gradients(self, norm: float) -> None:
        """From sums to means, clipped."""
        limit = self._optimizer.clip_grad
        # DeepSpeed's own formula, the same in every stage.
        too_large = max((norm + 1e-6) / limit, 1.0) if limit > 0.0 else 1.0
        if too_large * self._sums.num_summed != 1.0:
            self._sums.total.mul_(1.0 / (too_large * self._sums.num_summed))

    def _step_every_group(self) -> None:
        inner = self._optimizer.optimizer
        gradients = self._sums.total.split([master.numel() for master in self._masters])
        for master, gradient in zip(self._masters, gradients, strict=True):
            master.grad = gradient
        for group, members in self._members.items():
            inner.param_groups[group]["params"] = members
        inner.step()
        # As DeepSpeed leaves them: its saving counts on groups without parameters.
        for group in self._members:
            inner.param_groups[group]["params"] = []
        for master in self._masters:
            master.grad = None

    def _copy_to_weights(self) -> None:
        """Those that the model computes with; in float32 they are the masters themselves, unless offloaded."""
        pairs = [
            (weights, master)
            for weights, master in zip(self._optimizer.fp16_partitioned_groups_flat, self._masters, strict=True)
            if weights.data_ptr() != master.data_ptr()
        ]
        if pairs:
            weights, masters = zip(*pairs, strict=True)
            torch._foreach_copy_(weights, masters)


def _step_groups_with_parameters(inner: torch.optim.Optimizer) -> None:
    step_all = inner.step

    def step(closure: Any = None) -> Any:
        every = inner.param_groups
        inner.param_groups = [group for group in every if group["params"]]
        try:
            return step_all(closure)
        finally:
            inner.param_groups = every

    inner.step = step  # type: ignore[method-assign]
