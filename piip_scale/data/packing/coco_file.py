"""A COCO file as JSON: read whatever it is packed in, known to be COCO, and split."""

from __future__ import annotations

import gzip
import json
import zlib
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from piip_scale.data.packing.door import decoded, whole_number
from piip_scale.data.reading.files import json_bytes, write_bytes
from piip_scale.errors import DataError

_GZIP = b"\x1f\x8b"
_ARCHIVES = {b"PK\x03\x04": "zip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
# A gzip file of some megabytes can hold more than any memory.
_MOST_UNPACKED, _MOST_RATIO = 10**9, 200
_BLOCK_BYTES = 1 << 24

_KEYS = ("images", "annotations", "categories")


def load_coco_json(annotations: Path) -> dict[str, Any]:
    """The parsed file, known to be a dict with non-empty images and categories and a list of annotations.

    Raises:
        DataError: The file is absent, empty, not JSON, or not COCO.
    """
    content = _read(annotations)
    try:
        root: dict[str, Any] = json.loads(content, object_pairs_hook=_each_key_once)
    except json.JSONDecodeError as error:
        raise DataError(
            f"annotation file {annotations} is not valid JSON",
            value=error.msg,
            rule=f"line {error.lineno}, column {error.colno} of {len(content)} characters cannot be read",
            fix="copy or export the file again",
        ) from None
    # Python's own limits: a number of thousands of digits, lists in lists without end.
    except (ValueError, RecursionError) as error:
        raise file_error(annotations, "is not a COCO file", str(error)) from None
    missing = [key for key in _KEYS if not isinstance(root, dict) or not isinstance(root.get(key), list)]
    if missing:
        raise file_error(annotations, f"has no list {', '.join(missing)}", f"COCO needs the lists {', '.join(_KEYS)}")
    for key in _KEYS:
        if not all(isinstance(item, dict) for item in root[key]):
            raise file_error(annotations, f"has an entry in {key!r} that is not a dict", "COCO lists hold dicts")
    for key in ("images", "categories"):
        if not root[key]:
            raise file_error(annotations, f"has no {key}", "at least one is needed")
    return root


def split_coco(annotations: Path, out: Path, *, val_share: float = 0.2, seed: int = 0) -> tuple[Path, Path]:
    """Splits a set by image into ``instances_train.json`` and ``instances_val.json`` under ``out``.

    The split depends on the seed and the image ids alone, and gives each side at least one image.

    Returns:
        The paths of the training and of the validation file.

    Raises:
        DataError: The file cannot be used, or has fewer than two images.
    """
    root = load_coco_json(annotations)
    ids = sorted(unique_ids(root["images"], "image", annotations))
    known = set(ids)
    stray = next((note for note in root["annotations"] if whole_number(note.get("image_id")) not in known), None)
    if stray is not None:
        raise stray_note(annotations, stray)
    if len(ids) < 2:
        raise file_error(annotations, "has one image", "a split needs at least two", "add images")
    if not 0 < val_share < 1:
        raise DataError("val_share of a split", value=val_share, rule="it must be between 0 and 1")
    shuffled = np.random.default_rng(seed).permutation(len(ids))
    num_val = min(max(round(val_share * len(ids)), 1), len(ids) - 1)
    val_ids = {ids[index] for index in shuffled[:num_val]}
    paths = out / "instances_train.json", out / "instances_val.json"
    for path, wanted in zip(paths, (known - val_ids, val_ids), strict=True):
        part = {
            **root,
            "images": [image for image in root["images"] if whole_number(image["id"]) in wanted],
            "annotations": [note for note in root["annotations"] if whole_number(note["image_id"]) in wanted],
        }
        write_bytes(path, json_bytes(part))
    return paths


def unique_ids(entries: list[dict[str, Any]], what: str, annotations: Path) -> dict[int, dict[str, Any]]:
    """Entries by their ids, which tools also write as text or as floats.

    Raises:
        DataError: One has no id, or another's.
    """
    by_id: dict[int, dict[str, Any]] = {}
    for entry in entries:
        key = whole_number(entry.get("id"))
        if key is None:
            raise file_error(
                annotations, f"has {what} id {entry.get('id')!r}", "ids are whole numbers from 0, below 2^63"
            )
        if key in by_id:
            raise file_error(annotations, f"has {what} id {key} twice", "ids are unique", "renumber them")
        by_id[key] = entry
    return by_id


def file_error(annotations: Path, problem: str, rule: str, fix: str = "export the file again") -> DataError:
    """An error of a whole file."""
    return DataError(f"annotation file {annotations} {problem}", rule=rule, fix=fix)


def stray_note(annotations: Path, note: dict[str, Any]) -> DataError:
    """The error of an annotation of an image that is not there."""
    problem = f"{annotations}: annotation {note.get('id')} is of image {note.get('image_id')!r}"
    return DataError(problem, rule="no image has that id", fix="remove it")


def is_text(value: object) -> TypeGuard[str]:
    """Whether a value is text with something in it."""
    return isinstance(value, str) and bool(value.strip())


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Of two lists of images Python's parser would keep the last silently.
    made = dict(pairs)
    if len(made) != len(pairs):
        twice = next(key for number, (key, _) in enumerate(pairs) if key in dict(pairs[:number]))
        raise ValueError(f"it has the key {twice!r} twice in one place")
    return made


def _read(annotations: Path) -> str:
    try:
        content = annotations.read_bytes()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise DataError(
            f"annotation file {annotations} is not there", rule="a COCO JSON file is needed", fix="check the path"
        ) from None
    except OSError as error:
        raise DataError(f"annotation file {annotations} cannot be read", value=str(error)) from error
    for mark, name in _ARCHIVES.items():
        if content.startswith(mark):
            raise file_error(
                annotations, f"is a {name} archive", "a COCO JSON is needed, or one packed with gzip", "unpack it"
            )
    try:
        text = decoded(_unpacked(content, annotations))
    except UnicodeDecodeError as error:
        raise DataError(f"annotation file {annotations} cannot be read", value=str(error)) from error
    if not text.strip():
        raise file_error(annotations, "is empty", "a COCO JSON is needed", "copy or export the file again")
    return text


def _unpacked(content: bytes, annotations: Path) -> bytes:
    if not content.startswith(_GZIP):
        return content
    blocks, num_bytes = [], 0
    try:
        with gzip.open(annotations) as file:
            while block := file.read(_BLOCK_BYTES):
                blocks.append(block)
                num_bytes += len(block)
                if num_bytes > max(_MOST_UNPACKED, _MOST_RATIO * len(content)):
                    raise file_error(annotations, "unpacks without end", "JSON shrinks 5 to 50 times", "unpack it")
    except (OSError, EOFError, zlib.error) as error:
        raise file_error(annotations, f"is damaged ({error})", "it is a gzip file", "copy it again") from None
    return b"".join(blocks)
