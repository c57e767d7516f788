"""The images and categories of a COCO file, checked one by one."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from piip_scale.data.images import MAX_PIXELS
from piip_scale.data.orientation import Exif, StatedSize, Undecided
from piip_scale.data.packing.coco_file import file_error, is_text, unique_ids
from piip_scale.data.packing.door import ClassNames, check_file_name, chosen_classes, stored_name, whole_number
from piip_scale.data.packing.finding import ImageFolder, is_below
from piip_scale.data.packing.image_views import views_of
from piip_scale.data.packing.problems import Problems
from piip_scale.errors import DataError


@dataclass(frozen=True, slots=True)
class Entry:
    """An image that is there.

    Attributes:
        name: Of its file under the folder, as it is on disk.
        size_px: Height and width.
    """

    image_id: int
    name: str
    size_px: tuple[int, int]
    num_bytes: int


@dataclass(frozen=True)
class Entries:
    """The images of a set.

    Attributes:
        images: In the file's order.
        undecided: What becomes of an orientation that no size decides.
        num_sized: Images whose size was not stated, or one side of it.
    """

    images: tuple[Entry, ...]
    undecided: Undecided | None
    num_sized: int


@dataclass(frozen=True)
class Categories:
    """The classes of a set.

    Attributes:
        chosen: ``{"id", "name"}`` in label order.
        known: Ids of all categories of the file.
        unused: Names that stand twice, of categories that no annotation has.
    """

    chosen: tuple[dict[str, Any], ...]
    known: frozenset[int]
    unused: tuple[str, ...]


def read_categories(
    root: dict[str, Any], annotations: Path, classes: Sequence[str], *, subset: bool, drop_unused: bool
) -> Categories:
    """The categories of a file, in the label order wanted.

    Args:
        root: The file.
        annotations: Its path.
        classes: Names in label order; empty takes the file's, by id.
        subset: ``classes`` may leave some of the file's out.
        drop_unused: Leave out those that no annotation has.

    Raises:
        DataError: A category has no id or name of its own, or the classes are not among them.
    """
    by_id = unique_ids(root["categories"], "category", annotations)
    door = ClassNames()
    names = {key: door.cleaned(entry.get("name"), f"category {key} of {annotations}") for key, entry in by_id.items()}
    used = {whole_number(note.get("category_id")) for note in root["annotations"]}
    counts = Counter(names.values())
    # Roboflow's files name the whole set as a category 0 of no annotation, at times as one of its classes.
    doubles = {key for key, name in names.items() if counts[name] > 1 and key not in used}
    left = {key: name for key, name in sorted(names.items()) if key not in doubles}
    if len(set(left.values())) != len(left) or set(left.values()) != set(names.values()):
        raise file_error(annotations, f"has category names {sorted(names.values())}", "each needs a name of its own")
    if drop_unused:
        left = {key: name for key, name in left.items() if key in used} or left
    ids = {name: key for key, name in left.items()}
    if classes:
        ids = {name: ids[name] for name in _chosen(classes, ids, annotations, subset)}
    chosen = tuple({"id": key, "name": name} for name, key in ids.items())
    return Categories(chosen, frozenset(names), tuple(names[key] for key in sorted(doubles)))


def _chosen(classes: Sequence[str], names: Collection[str], annotations: Path, subset: bool) -> tuple[str, ...]:
    chosen = chosen_classes(classes, names, str(annotations), subset=subset)
    if not subset and set(chosen) != set(names):
        raise DataError(
            f"categories of {annotations}",
            value=list(names),
            rule=f"they must be the classes {list(chosen)}",
            fix="change the classes, take some with --class, or change the file's categories",
        )
    return chosen


def read_entries(
    root: dict[str, Any],
    annotations: Path,
    folder: ImageFolder,
    problems: Problems,
    exif: Exif = "auto",
    max_pixels: int = MAX_PIXELS,
) -> Entries:
    """The images of a file that are there, in its order; what is wrong with others goes to ``problems``.

    Raises:
        DataError: One has no id, or another's.
    """
    found = []
    for image_id, image in unique_ids(root["images"], "image", annotations).items():
        with problems.collected("image"):
            name, num_bytes = _found(image_id, image, annotations, folder)
            found.append(_Found(image_id, name, num_bytes, _stated_size(image_id, image, annotations)))
    found = _each_file_once(found, annotations, problems)
    views = views_of(
        ((folder.path / each.name, partial(_same, each.stated)) for each in found), exif, max_pixels, str(annotations)
    )
    entries = []
    for each in found:
        with problems.collected("image"):
            owner = f"{annotations}: image {each.image_id}"
            size_px = views.size_px(folder.path / each.name, each.stated, owner)
            entries.append(Entry(each.image_id, each.name, size_px, each.num_bytes))
    return Entries(tuple(entries), views.undecided, sum(None in each.stated for each in found))


@dataclass(frozen=True, slots=True)
class _Found:
    """An image whose file is there, of a size that may not be stated."""

    image_id: int
    name: str
    num_bytes: int
    stated: StatedSize


def _same(stated: StatedSize) -> StatedSize:
    return stated


def _each_file_once(found: Sequence[_Found], annotations: Path, problems: Problems) -> list[_Found]:
    by_name = defaultdict(list)
    for each in found:
        by_name[each.name].append(each)
    doubles = {name for name, of_name in by_name.items() if len(of_name) > 1}
    for name in sorted(doubles):
        ids = [each.image_id for each in by_name[name]]
        with problems.collected("image"):
            raise DataError(
                f"{annotations}: images {', '.join(map(str, ids[:5]))} are one file, {stored_name(name)}",
                rule="its objects would be split over them, and each would train without the others'",
                fix="give them one id",
            )
    return [each for each in found if each.name not in doubles]


def _stated_size(image_id: int, image: dict[str, Any], annotations: Path) -> StatedSize:
    """Height and width as far as the file states them: many tools leave them out, or at 0."""
    stated = image.get("height"), image.get("width")
    height, width = (whole_number(value, least=1) for value in stated)
    for value, side in zip(stated, (height, width), strict=True):
        if side is None and not _is_missing(value):
            raise file_error(
                annotations, f"has height, width {stated} at image {image_id}", "both are positive integers"
            )
    return height, width


def _is_missing(value: object) -> bool:
    is_blank = value is None or value == 0 or (isinstance(value, str) and value.strip() in ("", "0", "null", "None"))
    # pandas writes NaN where it has nothing.
    return is_blank or (isinstance(value, float) and math.isnan(value))


def _found(image_id: int, image: dict[str, Any], annotations: Path, folder: ImageFolder) -> tuple[str, int]:
    owner = f"image {image_id} of {annotations}"
    names = _names(image, owner)
    if not all(is_below(name) for name in names):
        raise file_error(
            annotations, f"has file_name {names[0]!r} at image {image_id}", "it is a path below the folder"
        )
    for name in names:
        if (found := folder.find(name)) is not None:
            return found
    other = folder.file_of_that_name(names[0])
    raise DataError(
        f"{owner} is not there",
        value=str(folder.path / names[0]),
        rule="every image of the file must lie in the image folder",
        fix=f"{other} is there: name its folder with --images"
        if other
        else "check the image folder, or remove the entry",
    )


def _names(image: dict[str, Any], owner: str) -> list[str]:
    if image.get("file_name") is not None or not is_text(image.get("coco_url")):
        return [check_file_name(image.get("file_name"), owner)]
    # LVIS names no file, but where COCO has it: train2017/000000000001.jpg.
    path = check_file_name(urlparse(image["coco_url"]).path.lstrip("/"), owner)
    return [path, path.rpartition("/")[2]] if "/" in path else [path]
