"""Image folders, and lists of images with labels, to shards."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from piip_scale.data.packing.pack_plan import PackItem
from piip_scale.data.packing.packing import PackOptions, SetFacts, pack_items
from piip_scale.data.reading.files import json_bytes, sha256_of_file
from piip_scale.data.reading.shards import Category, Manifest
from piip_scale.errors import DataError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"})
"""What torchvision's ``ImageFolder`` takes, in any case."""

_STAT_THREADS = 32
Labelled = tuple[str, int]
"""An image's path under its folder, and its label."""


def pack_folders(
    folder: str | Path, out: str | Path, *, classes: Sequence[str] = (), how: PackOptions | None = None
) -> Manifest:
    """Packs a folder that holds one folder of images for each class; see ``pack_items``.

    Args:
        folder: Holds ``CLASS/image.jpg``; images may lie deeper.
        out: The folder to write.
        classes: Folder names in the label order wanted, also of classes without images here; empty takes the folders
            that are there, sorted by name.
        how: How shards are written.

    Raises:
        DataError: Something in the input is wrong, ``out`` holds another set, or it cannot be written.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError("image folder not found", value=str(folder), rule="it holds a folder for each class")
    found = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if unknown := sorted(set(found) - set(classes)) if classes else []:
        raise DataError(
            f"{folder} holds folders that are no class", value=unknown[:5], fix="name them, or move them away"
        )
    names = tuple(classes) or tuple(found)
    labelled = [(file, label) for label, name in enumerate(names) for file in images_under(folder, name)]
    if not classes and (empty := sorted(set(names) - {file.split("/")[0] for file, _ in labelled})):
        raise DataError(
            f"classes of {folder} without images", value=empty[:5], fix="remove the folders, or name all classes"
        )
    return _pack(folder, labelled, Path(out), names, {"folders": folder.name}, how or PackOptions())


def pack_list(
    file: str | Path, images: str | Path, out: str | Path, *, classes: Sequence[str], how: PackOptions | None = None
) -> Manifest:
    """Packs the images that a list names, a path and a label in a line, as ImageNet's lists do; see ``pack_items``.

    Args:
        file: The list; labels count from 0.
        images: The folder its paths are relative to.
        out: The folder to write.
        classes: Class names in label order.
        how: How shards are written.

    Raises:
        DataError: Something in the input is wrong, ``out`` holds another set, or it cannot be written.
    """
    file = Path(file)
    if not classes:
        raise DataError("classes of a list of images", rule="they must be named", fix="give --class-names, or --class")
    source = {"list": file.name, "list_sha256": sha256_of_file(file)} if file.is_file() else {}
    return _pack(Path(images), _read_list(file, len(classes)), Path(out), tuple(classes), source, how or PackOptions())


def read_class_names(file: Path) -> tuple[str, ...]:
    """Class names from a text file, one in a line, in label order.

    Raises:
        DataError: The file cannot be read, or has an empty line.
    """
    names = tuple(line.strip() for line in _lines(file))
    if not all(names):
        raise DataError(f"line {names.index('') + 1} of {file} is empty", rule="each line names a class")
    return names


def images_under(folder: Path, name: str = "") -> list[str]:
    """The images of a folder in ``folder``, or of all of it, by their paths under ``folder``, sorted.

    Raises:
        DataError: A file is no image.
    """
    found = []
    for place, folders, files in os.walk(folder / name, followlinks=True):
        folders[:] = [inner for inner in folders if not inner.startswith(".")]
        for file in files:
            path = Path(place, file)
            if file.startswith("."):
                continue
            if path.suffix.lower() not in IMAGE_SUFFIXES:
                raise DataError(
                    f"{path} is no image", rule=f"one of {', '.join(sorted(IMAGE_SUFFIXES))}", fix="remove it"
                )
            found.append(path.relative_to(folder).as_posix())
    return sorted(found)


def _read_list(file: Path, num_classes: int) -> list[Labelled]:
    labelled = []
    for number, line in enumerate(_lines(file), 1):
        # The label comes last: paths may hold spaces.
        path, _, label = line.strip().rpartition(" ")
        if not path or not label.isascii() or not label.isdecimal() or int(label) >= num_classes:
            raise DataError(
                f"line {number} of {file}", value=line.strip(), rule=f"a path, a space, a label of 0-{num_classes - 1}"
            )
        labelled.append((path.strip(), int(label)))
    return labelled


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"{file} cannot be read", value=os.strerror(error.errno or 0), fix="check the path") from None
    except UnicodeDecodeError:
        raise DataError(f"{file} is no text", rule="it must be UTF-8") from None


def _pack(
    images: Path,
    labelled: Sequence[Labelled],
    out: Path,
    classes: tuple[str, ...],
    source: dict[str, Any],
    how: PackOptions,
) -> Manifest:
    for what, names in (("classes", classes), ("images", [file for file, _ in labelled])):
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice or not names:
            rule = "each must be named once" if twice else f"there must be {what}"
            raise DataError(f"{what} of the set", value=twice[:5], rule=rule)
    categories = tuple(Category(id=label, name=name) for label, name in enumerate(classes))
    facts = SetFacts("classification", categories, False, options={}, source=source)
    return pack_items(list(_items(images, labelled)), out, facts, how)


def _items(images: Path, labelled: Sequence[Labelled]) -> Iterator[PackItem]:
    """The samples in the order of the shards."""
    paths = [images / file for file, _ in labelled]
    sizes = file_sizes(paths)
    # Sorted by class, a shard would hold one class or two, and a batch, drawn from few shards, too few.
    for number in mixed([file for file, _ in labelled]):
        file, label = labelled[number]
        notes = json_bytes({"image_id": number, "file_name": file, "label": label})
        yield PackItem(number, paths[number], None, sizes[number], 1, notes)


def file_sizes(paths: Sequence[Path]) -> list[int]:
    """Sizes of many files, in bytes.

    Raises:
        DataError: One cannot be read.
    """
    # Storage behind a network answers one question in a millisecond, and many at once in little more.
    with ThreadPoolExecutor(_STAT_THREADS) as threads:
        return list(threads.map(_file_bytes, paths))


def mixed(names: Sequence[str]) -> list[int]:
    """Their indices in an order that follows from the names alone, and mixes them well."""
    return sorted(range(len(names)), key=lambda index: hashlib.blake2b(names[index].encode()).digest())


def _file_bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise DataError(f"image {path} cannot be read", value=os.strerror(error.errno or 0)) from None
