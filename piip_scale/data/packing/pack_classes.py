"""Image folders, and lists of images with labels, to shards."""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from piip_scale.data.packing.door import (
    ClassNames,
    check_file_name,
    chosen_classes,
    class_names,
    read_lines,
    stored_name,
    whole_number,
)
from piip_scale.data.packing.finding import IMAGE_SUFFIXES, ImageFolder, is_below
from piip_scale.data.packing.pack_plan import PackItem
from piip_scale.data.packing.packing import PackOptions, PackSource, SetFacts, pack_items
from piip_scale.data.packing.problems import Problems
from piip_scale.data.packing.walking import file_sizes, files_of_several_names, images_under
from piip_scale.data.reading.files import json_bytes, sha256_of_file
from piip_scale.data.reading.manifest import Category, Manifest
from piip_scale.data.reading.targets import Counts
from piip_scale.errors import DataError
from piip_scale.text import printable

Labelled = tuple[str, int]
"""An image's path under its folder, and its label."""


def pack_folders(
    folder: str | Path,
    out: str | Path,
    *,
    classes: Sequence[str] = (),
    subset: bool = False,
    how: PackOptions | None = None,
) -> Manifest:
    """Packs a folder that holds one folder of images for each class; see ``pack_items``.

    Args:
        folder: Holds ``CLASS/image.jpg``; images may lie deeper.
        out: The folder to write.
        classes: Folder names in the label order wanted, also of classes without images here; empty takes the folders
            that are there, sorted by name.
        subset: ``classes`` are some of the folders; others are left out.
        how: How shards are written.

    Raises:
        DataError: Something in the input is wrong, ``out`` holds another set, or it cannot be written.
    """
    how = how or PackOptions()
    source = folder_source(Path(folder), classes=classes, subset=subset, how=how)
    return pack_items(source.items, Path(out), source.facts, how, source.problems)


def folder_source(folder: Path, *, classes: Sequence[str] = (), subset: bool = False, how: PackOptions) -> PackSource:
    """Folders of images as they would be packed; arguments as of ``pack_folders``.

    Raises:
        DataError: What keeps the whole set from being read.
    """
    problems = how.problems()
    found = _folders_by_class(folder, problems)
    chosen = chosen_classes(classes, found, str(folder), subset=subset) if classes else tuple(found)
    if not subset and (unknown := sorted(set(found) - set(chosen)) if classes else []):
        raise DataError(
            f"{folder} holds folders that are no class", value=unknown[:5], fix="name them, or move them away"
        )
    files = {name: images_under(folder, found[name], problems) if name in found else [] for name in chosen}
    if not classes and (empty := sorted(name for name in chosen if not files[name])) and not problems.stop:
        raise DataError(
            f"classes of {folder} without images", value=empty[:5], fix="remove the folders, or name all classes"
        )
    labelled = [(file, label) for label, name in enumerate(chosen) for file in files[name]]
    return _source(folder, labelled, chosen, {"folders": stored_name(folder.name)}, problems)


def _folders_by_class(folder: Path, problems: Problems) -> dict[str, str]:
    """Names of folders by the classes that they name, in the order of the folders' names."""
    if not folder.is_dir():
        raise DataError("image folder not found", value=str(folder), rule="it holds a folder for each class")
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    names = [entry.name for entry in entries if entry.is_dir()]
    for entry in entries:
        if not entry.is_dir() and (entry.is_symlink() or entry.suffix.lower() in IMAGE_SUFFIXES):
            with problems.collected("file"):
                raise DataError(
                    f"{printable(str(entry))} lies in no class's folder",
                    rule=f"{folder} holds a folder of images for each class",
                    fix="remove it, or correct the link" if entry.is_symlink() else "move it into one, or remove it",
                )
    by_class: dict[str, str] = {}
    door = ClassNames()
    for name in names:
        cleaned = door.of_folder(name, f"folder {folder}")
        if cleaned in by_class:
            raise DataError(
                f"two folders of {folder} name one class", value=[by_class[cleaned], name], fix="rename one of them"
            )
        by_class[cleaned] = name
    return by_class


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
    file, how = Path(file), how or PackOptions()
    problems = how.problems()
    if not classes:
        raise DataError("classes of a list of images", rule="they must be named", fix="give --class-names, or --class")
    names = class_names(classes, str(file))
    labelled = _read_list(file, len(names), ImageFolder(Path(images)), problems)
    source = {"list": stored_name(file.name), "list_sha256": sha256_of_file(file)}
    found = _source(Path(images), labelled, names, source, problems)
    return pack_items(found.items, Path(out), found.facts, how, found.problems)


def read_class_names(file: Path) -> tuple[str, ...]:
    """Class names from a text file, one in a line, in label order.

    Raises:
        DataError: The file cannot be read, has an empty line, or names a class twice.
    """
    lines = read_lines(file)
    while lines and not lines[-1].strip():
        lines.pop()
    for number, line in enumerate(lines, 1):
        # Skipped, it would give all that follow another label.
        if not line.strip():
            raise DataError(f"line {number} of {file} is empty", rule="each line names a class")
    return class_names(lines, str(file))


def _read_list(file: Path, num_classes: int, folder: ImageFolder, problems: Problems) -> list[Labelled]:
    labelled = []
    for number, line in enumerate(read_lines(file), 1):
        if not line.strip():
            continue
        with problems.collected("image"):
            labelled.append(_labelled(line.strip(), f"line {number} of {file}", num_classes, folder))
    return labelled


def _labelled(line: str, owner: str, num_classes: int, folder: ImageFolder) -> Labelled:
    # The label comes last: paths may hold spaces.
    path, _, label = line.replace("\t", " ").rpartition(" ")
    number = whole_number(label) if label.isascii() and label.isdecimal() else None
    if not path or number is None or number >= num_classes:
        raise DataError(owner, value=line, rule=f"a path, a space, a label of 0-{num_classes - 1}")
    name = check_file_name(line[: len(path)].strip(), owner)
    if os.path.isabs(name) and Path(name).is_relative_to(folder.path.absolute()):
        name = str(Path(name).relative_to(folder.path.absolute()))
    if not is_below(name):
        raise DataError(
            f"{owner} names {name!r}", rule=f"it is a path below {folder.path}", fix="name the folder with --images"
        )
    found = folder.find(name)
    # What is not found under another spelling fails by the name that the list has.
    return (name if found is None else found[0]), number


def _source(
    images: Path,
    labelled: Sequence[Labelled],
    classes: tuple[str, ...],
    source: dict[str, Any],
    problems: Problems,
) -> PackSource:
    if not classes or (not labelled and not problems.found):
        # What lies there instead explains it.
        problems.settle(str(images))
        raise DataError(f"{'images' if classes else 'classes'} of the set", value=[], rule="there must be some")
    unique = _of_one_class(images, _each_once(labelled, problems), problems)
    categories = tuple(Category(id=label, name=name) for label, name in enumerate(classes))
    items = list(_items(images, unique, problems))
    counts: Counts = Counter()
    for item, label in items:
        counts[label, ""] += item.num_annotations
    # Of a class any view is one: what can be turned is, without a question.
    facts = SetFacts("classification", categories, False, {}, source, counts, undecided="apply")
    return PackSource(facts, [item for item, _ in items], problems)


def _each_once(labelled: Sequence[Labelled], problems: Problems) -> list[Labelled]:
    """Images that are named once; which of two labels of another is meant nobody knows."""
    labels_of = defaultdict(list)
    for file, label in labelled:
        labels_of[file].append(label)
    for twice in (file for file, labels in labels_of.items() if len(labels) > 1):
        with problems.collected("image"):
            raise DataError("images of the set", value=[stored_name(twice)], rule="each must be named once")
    return [(file, label) for file, label in labelled if len(labels_of[file]) == 1]


def _of_one_class(images: Path, labelled: Sequence[Labelled], problems: Problems) -> list[Labelled]:
    """Images whose file has one class: through links one may lie in the folders of several."""
    left_out: set[int] = set()
    for indices in files_of_several_names([images / file for file, _ in labelled]):
        if len({labelled[index][1] for index in indices}) > 1:
            left_out.update(indices)
            with problems.collected("image"):
                names = ", ".join(stored_name(labelled[index][0]) for index in indices[:5])
                raise DataError(f"images {names} are one file", rule="it has one class", fix="remove the other links")
    return [each for index, each in enumerate(labelled) if index not in left_out]


def _items(images: Path, labelled: Sequence[Labelled], problems: Problems) -> Iterator[tuple[PackItem, int]]:
    """The samples in the order of the shards, with their labels."""
    paths = [images / file for file, _ in labelled]
    sizes = file_sizes(paths, problems)
    # Sorted by class, a shard would hold one class or two, and a batch, drawn from few shards, too few.
    for number in mixed([file for file, _ in labelled]):
        (file, label), size = labelled[number], sizes[number]
        if size is not None:
            notes = json_bytes({"image_id": number, "file_name": stored_name(file), "label": label})
            yield PackItem(number, paths[number], None, size, 1, notes, category_ids=(label,)), label


def mixed(names: Sequence[str]) -> list[int]:
    """Their indices in an order that follows from the names alone, and mixes them well."""
    return sorted(
        range(len(names)), key=lambda index: hashlib.blake2b(names[index].encode("utf-8", "surrogateescape")).digest()
    )
