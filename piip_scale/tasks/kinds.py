"""From a run's config to its task, its model and what draws its predictions, by the registry's rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from piip_scale.config.run import RunConfig
from piip_scale.registry import row_of
from piip_scale.tasks.classes import class_names
from piip_scale.world import World

if TYPE_CHECKING:
    from piip_scale.data.batch import Batch
    from piip_scale.data.reading.opened import OpenedSets
    from piip_scale.data.reading.sample_set import SampleSet
    from piip_scale.tasks.base import Predictor, Task
    from piip_scale.tasks.views import Views


def build_task(
    config: RunConfig,
    world: World,
    broken_samples: Path | None = None,
    val_set: SampleSet | None = None,
    sets: OpenedSets | None = None,
) -> Task:
    """The task of a run.

    Args:
        config: The run.
        world: This rank among all.
        broken_samples: A folder of the run where its ranks put down which samples are broken, if it has one.
        val_set: A set to evaluate on in place of the validation shards, of the config's classes.
        sets: Those that this process has open; ``None`` for none.

    Raises:
        DataError: Validation shards that are absent, damaged, or of other classes than the config's.
    """
    task: Task = row_of(config.task).load("task")(config, world, broken_samples, val_set, sets)
    return task


def build_model(config: RunConfig, num_classes: int, network_device: str | None = None) -> nn.Module:
    """The model of a run with random weights, on torch's default device in float32; needs no shards.

    Args:
        config: The run.
        num_classes: Classes.
        network_device: Where the network is built, if elsewhere; ``meta`` leaves it without values.

    Raises:
        ConfigError: Heads that cannot be built as the config says.
        KernelError: A kernel that the config names cannot be had.
    """
    model: nn.Module = row_of(config.task).load("model")(config, num_classes, network_device)
    return model


def load_model(config: RunConfig, weights: Path) -> nn.Module:
    """A trained model in eval mode, on the CPU in float32; see ``tasks.trained`` for what a run's directory holds.

    Args:
        config: Of the run that the weights come from.
        weights: A safetensors file, or a folder of them.

    Raises:
        ModelError: The file is absent or damaged, or its weights are not this model's.
        ConfigError: Neither the config nor its shards name classes.
    """
    from piip_scale.tasks.trained import Trained
    from piip_scale.tasks.weights import SafetensorsWeights

    return Trained(config, SafetensorsWeights(weights)).load()


def view_predictor(config: RunConfig, model: nn.Module, views: Views) -> Callable[[Sequence[Batch]], Sequence[Any]]:
    """Predicts images from batches of them, one for each scale of the views."""
    if views.is_one:
        return lambda batches: model.predict(batches[0])  # type: ignore[operator]  # a TrainableModel
    merge = row_of(config.task).load("views")
    return lambda batches: merge(model, batches, views)


def build_predictor(config: RunConfig, model: nn.Module, min_score: float | None) -> Predictor:
    """What a trained model finds in single images, drawn and written down.

    Args:
        config: Of the run that the weights come from.
        model: From ``load_model``, on any device.
        min_score: What scores less is not drawn; ``None`` is the task's own: 0.5 for objects, 0 for classes.

    Raises:
        ConfigError: Neither the config nor its shards name classes.
    """
    predictor: Predictor = row_of(config.task).load("predictor")(config, model, class_names(config), min_score)
    return predictor
