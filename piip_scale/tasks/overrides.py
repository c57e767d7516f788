"""A user's changes to a dict of mmdet's or mmseg's, each key checked against what they would read."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from piip_scale.errors import ConfigError
from piip_scale.tasks.mmlab import DefaultScope, find_class

Tree = dict[str, Any]

# Which class reads a dict of mmdet's that names none by a ``type``.
_READERS = {
    "encoder": "DeformableDetrTransformerEncoder",
    "encoder.layer_cfg": "DeformableDetrTransformerEncoderLayer",
    "encoder.layer_cfg.self_attn_cfg": "MultiScaleDeformableAttention",
    "encoder.layer_cfg.ffn_cfg": "FFN",
    "decoder": "DinoTransformerDecoder",
    "decoder.layer_cfg": "DeformableDetrTransformerDecoderLayer",
    "decoder.layer_cfg.self_attn_cfg": "MultiheadAttention",
    "decoder.layer_cfg.cross_attn_cfg": "MultiScaleDeformableAttention",
    "decoder.layer_cfg.ffn_cfg": "FFN",
    "positional_encoding": "SinePositionalEncoding",
    "dn_cfg": "CdnQueryGenerator",
}
# Keys that mmdet reads where they are, and that its base configs leave out.
_OPTIONAL_KEYS = {"train_cfg.rcnn": ("soft_mask_target",)}
_ALWAYS_VALID = ("type", "_delete_")
_NMS_KEYS = ("split_thr", "class_agnostic")


@dataclass(frozen=True)
class Foreign:
    """Whose dicts are changed.

    Attributes:
        key: The config key that holds the changes, for messages.
        scope: Name of its registry.
        find_class: What it would build for a ``type``, ``None`` where it knows no such name.
    """

    key: str
    scope: str
    find_class: Callable[[str], Any]


MMDET = Foreign("detector.overrides", "mmdet", find_class)


def nested(overrides: Mapping[str, Any]) -> Tree:
    """Dotted keys spelled out as nested dicts."""
    tree: Tree = {}
    for key, value in overrides.items():
        head, _, rest = str(key).partition(".")
        value = {rest: value} if rest else value
        below = nested(value) if isinstance(value, Mapping) else value
        both = isinstance(tree.get(head), dict) and isinstance(below, dict)
        tree[head] = _joined(tree[head], below) if both else below
    return tree


def _joined(left: Tree, right: Tree) -> Tree:
    common = {
        key: _joined(left[key], value)
        for key, value in right.items()
        if isinstance(left.get(key), dict) and isinstance(value, dict)
    }
    return left | right | common


def merged(base: Tree, overrides: Tree, kind: str, foreign: Foreign = MMDET) -> Tree:
    """The model dict with overrides on top.

    Args:
        base: The model dict.
        overrides: As ``nested`` gives them.
        kind: The detector's name, for messages.
        foreign: Whose dict it is.

    Raises:
        ConfigError: A key that neither the dict nor the class that reads it knows; the nearest ones are named.
    """
    with DefaultScope.overwrite_default_scope(foreign.scope):
        result: Tree = _merged(base, overrides, "", kind, foreign)
    return result


def _merged(base: Any, extra: Any, path: str, kind: str, foreign: Foreign) -> Any:
    if not isinstance(extra, dict) or not isinstance(base, dict | list) or extra.get("_delete_"):
        return _plain(extra)
    if isinstance(base, list):
        return _merged_list(base, extra, path, kind, foreign)
    result = dict(base)
    for key, value in extra.items():
        where = f"{path}.{key}" if path else key
        _check_key(base, extra, key, path, kind, foreign)
        result[key] = _merged(base.get(key), value, where, kind, foreign)
    return result


def _merged_list(base: list[Any], extra: Tree, path: str, kind: str, foreign: Foreign) -> list[Any]:
    if not all(key.isdecimal() for key in extra):
        return [_merged(item, extra, path, kind, foreign) for item in base]
    result = list(base)
    for key, value in extra.items():
        if int(key) >= len(base):
            raise ConfigError(f"config key {foreign.key}.{path}.{key}", rule=f"{path} has entries 0 to {len(base) - 1}")
        result[int(key)] = _merged(base[int(key)], value, path, kind, foreign)
    return result


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if key != "_delete_"}
    return value


def _check_key(base: Tree, extra: Tree, key: str, path: str, kind: str, foreign: Foreign) -> None:
    reader = extra.get("type", base.get("type")) or _READERS.get(path)
    valid = {*base, *_arguments(reader, foreign), *_OPTIONAL_KEYS.get(path, ())}
    if key in valid or key in _ALWAYS_VALID:
        return
    near = difflib.get_close_matches(key, sorted(valid), n=3, cutoff=0.4)
    raise ConfigError(
        f"unknown config key {foreign.key}.{path}.{key}" if path else f"unknown config key {foreign.key}.{key}",
        rule=f"{reader or kind + ' there'} knows {', '.join(sorted(valid))}",
        fix=f"did you mean {' or '.join(near)}?" if near else "",
    )


def _arguments(name: object, foreign: Foreign) -> set[str]:
    """Names of all arguments a class or function of mmdet's takes, through the classes it hands ``**kwargs`` to."""
    found = foreign.find_class(name) if isinstance(name, str) else None
    if found is None:
        return set()
    if not inspect.isclass(found):
        return {*inspect.signature(found).parameters, *_NMS_KEYS}
    names: set[str] = set()
    for cls in found.__mro__:
        if "__init__" not in vars(cls):
            continue
        parameters = inspect.signature(vars(cls)["__init__"]).parameters.values()
        names |= {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return names - {"self"}


def mentions(tree: Any, path: Sequence[str]) -> bool:
    """Whether overrides set something at a path."""
    if not path or not isinstance(tree, dict):
        return not path
    entries = [tree[path[0]]] if path[0] in tree else [tree[key] for key in tree if key.isdecimal()]
    rests = [path[1:] if path[0] in tree else path] * len(entries)
    return any(mentions(entry, rest) for entry, rest in zip(entries, rests, strict=True))


def exists(tree: Any, path: Sequence[str]) -> bool:
    """Whether a path leads to something."""
    return not path or (isinstance(tree, dict) and path[0] in tree and exists(tree[path[0]], path[1:]))


def values_at(tree: Any, path: Sequence[str]) -> list[Any]:
    """What lies at a path, once for every entry of a list on the way; nothing where it does not exist."""
    if not path:
        return [tree]
    if isinstance(tree, list):
        return [value for item in tree for value in values_at(item, path)]
    return values_at(tree[path[0]], path[1:]) if isinstance(tree, dict) and path[0] in tree else []


def assign(tree: Any, path: Sequence[str], value: Any) -> None:
    """Sets the value at a path, in every entry of a list on the way; a path that does not exist is left alone."""
    if isinstance(tree, list):
        for item in tree:
            assign(item, path, value)
    elif len(path) == 1:
        tree[path[0]] = value
    elif isinstance(tree.get(path[0]), dict | list):
        assign(tree[path[0]], path[1:], value)
