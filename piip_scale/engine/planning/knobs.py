"""Knobs that make a run need less of each GPU, as variants of its config."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from pydantic import ValidationError

from piip_scale.config.run import DataConfig, RunConfig
from piip_scale.engine.batching import with_micro_batch

OFFLOADING_BEGINS = ""
"""In the place of a knob, where those begin that cost most time."""


def turned(config: RunConfig) -> Iterator[tuple[str, RunConfig]]:
    """The config after one knob more each time, and the knob as a user would write it."""
    config = all_checkpointed(config)
    yield "model.branches.*.checkpoint_blocks=True, model.interaction.checkpoint_units=True", config
    for micro in _smaller(config.data):
        config = config.model_copy(update={"data": micro})
        yield f"data.micro_batch_size={micro.micro_batch_size}", config
    yield OFFLOADING_BEGINS, config
    for field in ("offload_optimizer", "offload_parameters"):
        config = config.model_copy(update={"zero": config.zero.model_copy(update={field: "cpu"})})
        yield f"zero.{field}='cpu'", config


def _smaller(data: DataConfig) -> Iterator[DataConfig]:
    """The data with its micro-batch halved again and again, as far as its task lets it be."""
    size = data.micro_batch_size
    while size > 1:
        size //= 2
        try:
            yield with_micro_batch(data, size)
        except ValidationError:
            return


def all_checkpointed(config: RunConfig) -> RunConfig:
    """The run with every block and every interaction unit computed again in the backward pass."""
    return _with_units(with_checkpointed(config, range(len(config.model.branches))), again=True)


def none_checkpointed(config: RunConfig) -> RunConfig:
    """The run that computes nothing again."""
    return _with_units(with_checkpointed(config, ()), again=False)


def _with_units(config: RunConfig, *, again: bool) -> RunConfig:
    unit = config.model.interaction.model_copy(update={"checkpoint_units": again})
    return config.model_copy(update={"model": config.model.model_copy(update={"interaction": unit})})


def with_checkpointed(config: RunConfig, again: Collection[int]) -> RunConfig:
    """The run with these branches, by index, computing their blocks again, and no others."""
    branches = tuple(
        branch.model_copy(update={"checkpoint_blocks": index in again})
        for index, branch in enumerate(config.model.branches)
    )
    return config.model_copy(update={"model": config.model.model_copy(update={"branches": branches})})
