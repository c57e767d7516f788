"""A file of a whole model's weights, ours or released, and the classes that it says it was trained on."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from piip_scale.errors import ModelError
from piip_scale.models.official_keys import unwrap_whole
from piip_scale.models.pretrained import indexed_files, load_pickle, read_weights, weights_in

CLASSES = "classes"
"""Key in the metadata of weights that were imported: the names in label order, as JSON."""

_CONFIG = "config"
"""Key in the metadata of weights that were converted: the run's config, as a config file."""
_META = "meta"
_PICKLES = (".pth", ".pt", ".bin")
_NAMES_SHOWN = 5


@dataclass(frozen=True)
class WholeFile:
    """What is in the file.

    Attributes:
        tensors: By the file's own names, mapped and not read.
        classes: Names in label order; empty where the file does not say.
    """

    tensors: dict[str, Tensor]
    classes: tuple[str, ...]


def read_whole_file(path: Path) -> WholeFile:
    """Reads weights that ``convert`` or ``weights import`` wrote, or a released checkpoint with its neck and heads.

    Args:
        path: As ``read_weights`` takes it.

    Raises:
        ModelError: The file is absent, damaged, or a pickle that would run code.
    """
    if path.suffix in _PICKLES and path.is_file():
        content = load_pickle(path)
        return WholeFile(unwrap_whole(content), _classes_in_meta(content))
    tensors = read_weights(path)
    return WholeFile(tensors, _classes_in_metadata(_metadata(path)))


def _metadata(path: Path) -> Mapping[str, str]:
    from safetensors import safe_open

    if path.is_dir():
        path = weights_in(path)
    first = path.parent / indexed_files(path)[0] if path.suffix == ".json" else path
    if first.suffix != ".safetensors":
        return {}
    with safe_open(first, framework="pt") as file:
        return file.metadata() or {}


def _classes_in_metadata(metadata: Mapping[str, str]) -> tuple[str, ...]:
    try:
        if CLASSES in metadata:
            return _names(json.loads(metadata[CLASSES]))
        return _names(_classes_in_config(metadata.get(_CONFIG, "")))
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return ()


def _classes_in_config(text: str) -> Any:
    """``data.classes`` of a resolved config, whose values are literals: nothing of it is run."""
    for statement in ast.parse(text).body:
        if isinstance(statement, ast.Assign) and [ast.unparse(target) for target in statement.targets] == ["data"]:
            data = ast.literal_eval(statement.value)
            return data.get(CLASSES) if isinstance(data, dict) else None
    return None


def _classes_in_meta(content: Mapping[str, Any]) -> tuple[str, ...]:
    """What mmcv writes beside a detector's weights."""
    meta = content.get(_META)
    return _names(meta.get("CLASSES")) if isinstance(meta, Mapping) else ()


def _names(value: Any) -> tuple[str, ...]:
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    return tuple(value) if is_list and all(isinstance(name, str) for name in value) else ()


def require_classes(path: Path, found: Sequence[str], wanted: Sequence[str], fix: str) -> None:
    """Raises a ``ModelError`` where a file and a run both name their classes, and not the same ones in the same order.

    Args:
        path: The file.
        found: Its classes; empty where it does not say.
        wanted: The run's; empty where it does not say.
        fix: What to do about it.
    """
    if found and wanted and tuple(found) != tuple(wanted):
        order = "the same in another order" if sorted(found) == sorted(wanted) else _listed(found)
        raise ModelError(
            f"{path} was trained on other classes", value=order, rule=f"this run has {_listed(wanted)}", fix=fix
        )


def _listed(names: Sequence[str]) -> str:
    more = ", ..." if len(names) > _NAMES_SHOWN else ""
    return f"{len(names)} ({', '.join(names[:_NAMES_SHOWN])}{more})"
