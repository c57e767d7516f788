"""The class names of a run."""

from __future__ import annotations

from piip_scale.config.run import RunConfig
from piip_scale.data.reading.set_files import has_manifest
from piip_scale.data.reading.shards import ShardSet
from piip_scale.errors import ConfigError


def class_names(config: RunConfig) -> tuple[str, ...]:
    """The classes of a run: as the config names them, else those of its validation or training shards.

    Raises:
        ConfigError: The config names none, and its shards are not there.
        DataError: The shards are damaged.
    """
    if classes := declared_classes(config):
        return classes
    raise ConfigError(
        "config key data.classes is empty, and the run's shards are not there",
        value=config.data.val_shards,
        fix="set data.classes to the names in label order, or use the config of the run directory",
    )


def declared_classes(config: RunConfig) -> tuple[str, ...]:
    """The classes of a run: as the config names them, else those of its shards; empty where neither names them.

    Raises:
        DataError: The shards are damaged.
    """
    if config.data.classes:
        return config.data.classes
    for location in (config.data.val_shards, config.data.train_shards):
        if has_manifest(location, config.data.cache):
            return ShardSet.open(location, cache=config.data.cache, max_pixels=config.data.max_pixels).classes
    return ()
