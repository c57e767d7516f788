"""From a config file to a checked ``RunConfig``."""

from __future__ import annotations

from piip_scale.config.run import RunConfig


def load_config(path: str) -> RunConfig:
    raise NotImplementedError
