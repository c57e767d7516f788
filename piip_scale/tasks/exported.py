"""The config of an exported model: what it is and how images reach it, and nothing of its makers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from piip_scale.config.loading import config_from
from piip_scale.config.run import RunConfig
from piip_scale.errors import ConfigError, ModelError

CONFIG = "config.json"
LIBRARY = "piip_scale"

# Paths and addresses of the machine that trained.
_PRIVATE = re.compile(r"^(/|~|\\\\|[A-Za-z]:\\)|://")
_WEIGHTS_ELSEWHERE = ("pretrained", "init_cfg")
_KERNELS = dict.fromkeys(("attention_kernel", "deform_kernel", "fused_kernel"), "auto")


def is_exported(path: Path) -> bool:
    """Whether a folder is one that ``export`` wrote."""
    return (path / CONFIG).is_file()


def read_exported(folder: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The config of an exported model.

    Args:
        folder: What ``export`` wrote.
        overrides: Changes to it, as ``load_config`` takes them.

    Raises:
        ModelError: Its config is damaged, or of another library.
        ConfigError: It cannot be meant as written.
    """
    path = folder / CONFIG
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read", value=str(error), fix="export the model again") from None
    if (
        not isinstance(content, dict)
        or content.get("model_type") != LIBRARY
        or not isinstance(content.get("run"), dict)
    ):
        raise ModelError(
            f"{path} is of another library",
            rule=f"model_type is {LIBRARY!r} and run holds the config",
            fix="`piip-scale export` writes such folders",
        )
    return config_from(content["run"], overrides)


def exported_values(config: RunConfig, classes: Sequence[str]) -> dict[str, Any]:
    """The plain values of a run that its model needs to look at images.

    Of data and training only what decides a prediction stays: sets, hosts and schedules are the trainer's own.

    Raises:
        ConfigError: What stays still names a place of this machine.
    """
    values = config.model_dump(mode="json")
    own = [key for key in values if key not in RunConfig.model_fields]
    kept = {key: _without_weights(values[key]) for key in ("task", "model", *own)}
    kept["model"] |= _KERNELS
    data, train = values["data"], values["train"]
    kept["data"] = {"train_shards": "shards/train", "val_shards": "shards/val", "classes": list(classes)}
    kept["data"] |= {key: data[key] for key in ("augment", "max_pixels")}
    # A config names a length.
    kept["train"] = {"steps": 1} | {key: train[key] for key in ("precision", "fp32_precision")}
    for key, text in _texts(kept):
        if _PRIVATE.search(text) and not key.startswith("data.classes"):
            raise ConfigError(
                f"config key {key} names a place", value=text, rule="an exported config has none of yours"
            )
    return kept


def config_json(config: RunConfig, classes: Sequence[str], version: str) -> dict[str, Any]:
    """``config.json`` in the hub's terms, with the run's own under ``run``."""
    return {
        "model_type": LIBRARY,
        f"{LIBRARY}_version": version,
        "architectures": ["PIIP"],
        "task": config.task,
        "num_labels": len(classes),
        "id2label": {str(label): name for label, name in enumerate(classes)},
        "label2id": {name: label for label, name in enumerate(classes)},
        "run": exported_values(config, classes),
    }


def _without_weights(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_weights(item) for key, item in value.items() if key not in _WEIGHTS_ELSEWHERE}
    return [_without_weights(item) for item in value] if isinstance(value, list) else value


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield key, value
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for name, item in items:
        yield from _texts(item, f"{key}.{name}".lstrip("."))
