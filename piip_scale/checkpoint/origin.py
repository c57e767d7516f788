"""What a converted file says of where it comes from: only what the checkpoint itself holds, and no secrets."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from piip_scale.config.loading import check_config, config_text
from piip_scale.config.run import RunConfig
from piip_scale.errors import CheckpointError, ConfigError

STATE_FILE = "training.json"
"""In each of our checkpoints: what it says of its training, beside the tensors."""

_PIPE = re.compile(r"^pipe:.*", re.DOTALL)
_USER = re.compile(r"(?<=://)[^/?#]*@")
# Of a remote location, where tokens and signatures are.
_QUERY = re.compile(r"(?<=://)([^?#]*)[?#].*", re.DOTALL)
_SECRET_KEY = re.compile(
    r"(^|[_-])(pass(word|wd|phrase)?|secrets?|tokens?|api_?keys?|access_?keys?|credentials?|auth)$", re.I
)
REMOVED = "removed"


@dataclass(frozen=True)
class OwnConfig:
    """The config that a checkpoint was trained with.

    Attributes:
        text: As a config file; empty where there is none.
        note: One line for the user where it is not there or not whole; empty where it is.
    """

    text: str = ""
    note: str = ""


def trained_config(checkpoint: Path) -> RunConfig:
    """The run that a checkpoint of ours was saved by.

    Raises:
        CheckpointError: It does not say, or this version cannot read it.
    """
    path = checkpoint / STATE_FILE
    try:
        return check_config(json.loads(path.read_text(encoding="utf-8"))["config"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, ConfigError) as error:
        reason = error.line if isinstance(error, ConfigError) else f"{type(error).__name__}: {error}"
        raise CheckpointError(f"the config in {path} cannot be read: {reason}") from error


def own_config(checkpoint: Path, *, with_lora: bool = True) -> OwnConfig:
    """The config inside a checkpoint, without the secrets that its locations may carry.

    Args:
        checkpoint: Its folder.
        with_lora: Or without the low-rank additions of branches, which have been merged.
    """
    try:
        content = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
        values, removed = _without_secrets(content["config"], "")
        for branch in () if with_lora else values["model"]["branches"]:
            if branch.pop("lora", None):
                branch.pop("frozen_dtype", None)
        text = config_text(check_config(values))
    except (FileNotFoundError, NotADirectoryError):
        return OwnConfig(note="the checkpoint holds no config, so the file has none in its metadata")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, ConfigError) as error:
        reason = error.line if isinstance(error, ConfigError) else f"{type(error).__name__}: {error}"
        return OwnConfig(note=f"the checkpoint's config cannot be read, so the file has none in its metadata: {reason}")
    note = f"left out of the config in the file's metadata, as it may hold secrets: {', '.join(removed)}"
    return OwnConfig(text, note if removed else "")


def _without_secrets(value: Any, key: str) -> tuple[Any, list[str]]:
    """A value without commands, credentials and signatures, and the keys that had some."""
    if isinstance(value, Mapping):
        parts = {name: _without_secrets(inner, f"{key}.{name}".lstrip(".")) for name, inner in value.items()}
        return {name: part for name, (part, _) in parts.items()}, [
            found for _, names in parts.values() for found in names
        ]
    if isinstance(value, list):
        items = [_without_secrets(inner, f"{key}.{index}") for index, inner in enumerate(value)]
        return [item for item, _ in items], [key for _, keys in items for key in keys]
    if not isinstance(value, str):
        return value, []
    cleaned = REMOVED if _SECRET_KEY.search(key.rpartition(".")[2]) else _clean(value)
    return cleaned, [] if cleaned == value else [key]


def _clean(text: str) -> str:
    return _QUERY.sub(r"\1", _USER.sub("", _PIPE.sub(f"pipe:{REMOVED}", text)))
