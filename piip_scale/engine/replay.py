"""A step of a run once more, forward and backward, in one process and without an update."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from piip_scale.config.run import RunConfig
from piip_scale.engine.batch_stream import BatchStream
from piip_scale.engine.step import seed_step, total_loss
from piip_scale.tasks.base import Task
from piip_scale.world import World


@dataclass(frozen=True)
class ReplayedBatch:
    """One micro-batch of a step that was replayed.

    Attributes:
        rank: Whose it was.
        micro: Its place among that rank's.
        asked_keys: Of the samples that the step asked for.
        keys: Of those it got: a broken one is replaced by its neighbour.
        losses: Named losses.
        grad_norm: Of the gradient of this and all micro-batches before it, in the step's scale.
    """

    rank: int
    micro: int
    asked_keys: tuple[str, ...]
    keys: tuple[str, ...]
    losses: dict[str, float]
    grad_norm: float


class FirstNotFinite:
    """Looks for the first value of a model that is not finite, in the order in which values come to be.

    Waits for the device at every module.

    Attributes:
        found: In words, where it was; ``None`` while all is finite.
    """

    def __init__(self) -> None:
        self.found: str | None = None
        self._place = ""

    def look_at_weights(self, model: nn.Module) -> None:
        """Looks at the parameters."""
        bad = [name for name, parameter in model.named_parameters() if not _is_finite(parameter)]
        if bad:
            self.found = f"{len(bad)} parameter(s) of the checkpoint itself, the first of them {bad[0]}"

    @contextmanager
    def watching(self, model: nn.Module, place: str) -> Iterator[None]:
        """Looks at every module's output and every parameter's gradient as they come; ``place`` says of what."""
        self._place = place
        handles = [
            module.register_forward_hook(partial(self._after_module, name or "the model"))
            for name, module in model.named_modules()
        ]
        handles += [
            parameter.register_post_accumulate_grad_hook(partial(self._after_gradient, name))
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _after_module(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if self.found is None and not _is_finite(output):
            state = "finite" if _is_finite(inputs) else "not finite either, though no module's output"
            self.found = f"{self._place}: the output of {name} ({type(module).__name__}); its inputs were {state}"

    def _after_gradient(self, name: str, parameter: Tensor) -> None:
        if self.found is None and not _is_finite(parameter.grad):
            self.found = f"{self._place}: the gradient of {name}, with all outputs of modules finite"


def _is_finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(torch.isfinite(value).all())
    if isinstance(value, Mapping):
        return all(map(_is_finite, value.values()))
    return not isinstance(value, list | tuple) or all(map(_is_finite, value))


def replayed(
    model: nn.Module,
    task_of: Callable[[World], Task],
    config: RunConfig,
    step: int,
    num_ranks: int,
    first: FirstNotFinite,
) -> Iterator[ReplayedBatch]:
    """Yields each micro-batch of a step, as it was on each of the ranks, one after the other. Not collective.

    Random numbers are those of the run's. Gradients are summed in the dtype of the parameters; what heads average over
    the ranks of a step (DINO's numbers of boxes) is each rank's own here.

    Args:
        model: A ``TrainableModel`` in training mode; its gradients become the step's, its weights stay.
        task_of: Makes the task of a rank.
        config: The run, scaled to its ranks.
        step: Index of the step.
        num_ranks: That made it.
        first: Looks at every value.

    Raises:
        PiipError: Samples cannot be loaded, or the model returns no loss.
    """
    device = next(model.parameters()).device
    num_batches = num_ranks * config.train.gradient_accumulation
    model.zero_grad()
    for rank in range(num_ranks):
        world = World(rank=rank, num_ranks=num_ranks, local_rank=rank, ranks_per_node=num_ranks)
        stream = BatchStream(task_of(world), config.train, device)
        for micro, (batch, asked) in enumerate(zip(stream.step(step), stream.keys(step), strict=True)):
            seed_step(config.train.seed, step, micro * num_ranks + rank)
            with first.watching(model, f"rank {rank}, micro-batch {micro}"):
                losses: dict[str, Tensor] = model(batch)
                (total_loss(losses) / num_batches).backward()  # type: ignore[no-untyped-call]
            yield ReplayedBatch(
                rank,
                micro,
                tuple(asked),
                tuple(info.key for info in batch.infos),
                {name: value.item() for name, value in losses.items()},
                grad_norm(model),
            )


def grad_norm(model: nn.Module) -> float:
    """Norm of the whole gradient."""
    return nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]).item()


def loading_here(config: RunConfig) -> RunConfig:
    """The config with samples loaded by the process itself, which changes none of them."""
    return config.model_copy(update={"data": config.data.model_copy(update={"workers": 0})})


def with_buffers_of_its_own(model: nn.Module) -> nn.Module:
    """The model in training mode; what a forward pass changes is no page of the checkpoint's files."""
    for buffer in model.buffers():
        buffer.data = buffer.data.clone()
    return model.train()
