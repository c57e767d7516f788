"""What a run's whole model weighs and costs, part by part, by the registry's rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from piip_scale.config.run import RunConfig
from piip_scale.data.reading.opened import OpenedSets
from piip_scale.models.counting import PartCount, count_network, recomputed_macs
from piip_scale.models.work import FLOPS_PER_MAC
from piip_scale.registry import row_of
from piip_scale.tasks.classes import declared_classes


class Counting(Protocol):
    """A task's count of one image: its row's ``counting`` makes it of a config and the number of classes.

    Either counts an evaluation, or a training step of the config's micro-batch with its backward pass.
    """

    def network(self, height_px: int, width_px: int, *, training: bool) -> tuple[PartCount, ...]:
        """What runs in the precision of the run: branches, interactions and, where the task has them, pyramids."""
        ...

    def heads(self, height_px: int, width_px: int, *, training: bool) -> tuple[PartCount, ...]:
        """What follows, in float32: necks and heads.

        Raises:
            ConfigError: Heads that cannot be built, or that no rule counts.
        """
        ...


@dataclass(frozen=True)
class PyramidCounting:
    """The network of tasks whose heads take a feature pyramid.

    Attributes:
        config: The run.
        num_classes: Classes without background.
    """

    config: RunConfig
    num_classes: int

    def network(self, height_px: int, width_px: int, *, training: bool) -> tuple[PartCount, ...]:
        """See ``Counting.network``."""
        batch = self.config.data.micro_batch_size if training else None
        return count_network(self.config.model, height_px, width_px, training_batch=batch)


@dataclass(frozen=True)
class RunCount:
    """The count of a whole model.

    Attributes:
        parts: The network's, then what follows it.
        num_classes: Classes that the heads were built for.
        assumed_set: The public set that has so many, where neither the config nor its shards name any; else empty.
    """

    parts: tuple[PartCount, ...]
    num_classes: int
    assumed_set: str


def counting_of(config: RunConfig, num_classes: int) -> Counting:
    """The count of a run's task."""
    counting: Counting = row_of(config.task).load("counting")(config, num_classes)
    return counting


def count_run(config: RunConfig, height_px: int, width_px: int, *, training: bool = False) -> RunCount:
    """Counts everything a run's model computes for one image. Builds no weights.

    Args:
        config: The run.
        height_px: Height of the network's input, at the last branch's resolution.
        width_px: Width likewise.
        training: Count a training step and its backward pass, not an evaluation.

    Raises:
        ConfigError: Heads that cannot be built, or that no rule counts.
        DataError: The run's shards are damaged.
    """
    name, num_classes = likely_classes(config, OpenedSets())
    counting = counting_of(config, num_classes)
    network = counting.network(height_px, width_px, training=training)
    heads = counting.heads(height_px, width_px, training=training)
    return RunCount((*network, *heads), num_classes, name)


def network_flops(config: RunConfig, num_classes: int, height_px: int, width_px: int) -> int:
    """Model FLOPs of one image in a training step, without neck and heads: what MFU is measured by, and planned with.

    Backward passes count as far as something is trained, see ``models.work``. Neck and heads are out because they
    compute in float32, to which the peak of the run's precision does not apply, and because what they compute depends
    on what an image shows.
    """
    network = counting_of(config, num_classes).network(height_px, width_px, training=True)
    return sum(part.training_flops for part in network)


def recomputed_flops(config: RunConfig, num_classes: int, height_px: int, width_px: int) -> int:
    """FLOPs of one image that a training step computes a second time, blocks and units: no model FLOPs."""
    network = counting_of(config, num_classes).network(height_px, width_px, training=True)
    return FLOPS_PER_MAC * sum(recomputed_macs(config.model, network))


def head_flops(config: RunConfig, num_classes: int, height_px: int, width_px: int) -> int:
    """The same of neck and heads, where an image has as many objects as the heads' samplers take.

    Raises:
        ConfigError: Heads that cannot be built, or that no rule counts.
    """
    heads = counting_of(config, num_classes).heads(height_px, width_px, training=True)
    return sum(part.training_flops for part in heads)


def likely_classes(config: RunConfig, sets: OpenedSets) -> tuple[str, int]:
    """How many classes a run has, and the public set whose number it is where neither config nor shards name any.

    Args:
        config: The run.
        sets: Those that are open.

    Raises:
        DataError: The run's shards are damaged.
    """
    if classes := declared_classes(config, sets):
        return "", len(classes)
    if config.data.num_classes is not None:
        return "", config.data.num_classes
    public = row_of(config.task).public_set
    return public.name, public.num_classes
