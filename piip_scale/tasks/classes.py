"""The class names of a run."""

from __future__ import annotations

from collections.abc import Sequence

from piip_scale.config.run import RunConfig
from piip_scale.data.reading.opened import OpenedSets
from piip_scale.errors import ConfigError
from piip_scale.registry import row_of


def with_classes(config: RunConfig, sets: OpenedSets) -> RunConfig:
    """The config with the shards' class names, after checking that both sets are there and agree.

    Args:
        config: The run.
        sets: Gets both, open.

    Raises:
        DataError: A set is absent, damaged, packed for another task, or of other classes.
    """
    data, kind = config.data, row_of(config.task).set_kind
    classes = sets.open(data.train_shards, data, data.classes, kind).classes
    sets.open(data.val_shards, data, classes, kind)
    return naming(config, classes)


def naming(config: RunConfig, classes: Sequence[str]) -> RunConfig:
    """The config with these class names, in label order."""
    return config.model_copy(update={"data": config.data.model_copy(update={"classes": tuple(classes)})})


def class_names(config: RunConfig) -> tuple[str, ...]:
    """The classes of a run: as the config names them, else those of its validation or training shards.

    Raises:
        ConfigError: The config names none, and its shards are not there.
        DataError: The shards are damaged.
    """
    if classes := declared_classes(config, OpenedSets()):
        return classes
    raise ConfigError(
        "config key data.classes is empty, and the run's shards are not there",
        value=config.data.val_shards,
        fix="set data.classes to the names in label order, or use the config of the run directory",
    )


def declared_classes(config: RunConfig, sets: OpenedSets) -> tuple[str, ...]:
    """The classes of a run: as the config names them, else those of its shards; empty where neither names them.

    Args:
        config: The run.
        sets: Those that are open.

    Raises:
        DataError: The shards are damaged.
    """
    if config.data.classes:
        return config.data.classes
    for location in (config.data.val_shards, config.data.train_shards):
        if (shards := sets.find(location, config.data)) is not None:
            return shards.classes
    return ()
