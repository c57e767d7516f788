"""Pascal VOC's XML files, and the images that belong to them."""

from __future__ import annotations

import math
import os
import re
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from piip_scale.data.orientation import Exif, StatedSize, Undecided
from piip_scale.data.packing.door import ClassNames, check_file_name, read_lines
from piip_scale.data.packing.finding import IMAGE_SUFFIXES, ImageFolder
from piip_scale.data.packing.image_views import views_of
from piip_scale.data.packing.problems import Problems
from piip_scale.errors import DataError

_DECIMAL = re.compile(r"[0-9]{1,9}(\.[0-9]{0,9})?")
_DECLARED = re.compile(rb"^\s*<\?xml[^>]*?encoding\s*=\s*[\"']([A-Za-z0-9._-]+)[\"'][^>]*\?>", re.DOTALL)


@dataclass(frozen=True)
class VocObject:
    """An object as its file has it: the box as x, y, width, height in px, counted from pixel edges."""

    name: str
    box_xywh_px: tuple[float, float, float, float]
    is_difficult: bool


@dataclass(frozen=True)
class VocEntry:
    """An annotation file and its image.

    Attributes:
        file_name: Of the image, in its folder.
        size_px: Height and width.
        file_bytes: Of the image.
    """

    path: Path
    file_name: str
    size_px: tuple[int, int]
    file_bytes: int
    objects: tuple[VocObject, ...]


@dataclass(frozen=True)
class VocEntries:
    """The images of a set.

    Attributes:
        images: In the order of their names.
        undecided: What becomes of an orientation that no size decides.
        num_sized: Images whose size was not stated, or one side of it.
    """

    images: tuple[VocEntry, ...]
    undecided: Undecided | None
    num_sized: int


def read_entries(
    annotations: Path, images: Path, names: Path | None, problems: Problems, exif: Exif, max_pixels: int
) -> VocEntries:
    """All annotation files that can be used; what is wrong with others goes to ``problems``.

    Raises:
        DataError: There is no folder, no list or no file.
    """
    folder, door = _VocImages(images), ClassNames()
    found: list[_Parsed] = []
    for path in _files(annotations, images, names):
        with problems.collected("image"):
            found.append(_parsed_entry(path, folder, door))
    found = _each_image_once(found, annotations, problems)
    views = views_of(((images / each.name, each.stated_size) for each in found), exif, max_pixels, str(annotations))
    entries = []
    for each in found:
        with problems.collected("image"):
            size_px = views.size_px(images / each.name, each.stated, f"annotation file {each.path}")
            entries.append(VocEntry(each.path, each.name, size_px, each.num_bytes, each.objects))
    return VocEntries(tuple(entries), views.undecided, sum(None in each.stated for each in found))


@dataclass(frozen=True)
class _Parsed:
    """An annotation file whose image is there, of a size that may not be stated."""

    path: Path
    name: str
    num_bytes: int
    stated: StatedSize
    objects: tuple[VocObject, ...]

    def stated_size(self) -> StatedSize:
        """As ``StatedOf``."""
        return self.stated


def _each_image_once(found: Sequence[_Parsed], annotations: Path, problems: Problems) -> list[_Parsed]:
    by_image = defaultdict(list)
    for each in found:
        by_image[each.name].append(each.path.name)
    for file_name, of_image in by_image.items():
        if len(of_image) > 1:
            with problems.collected("image"):
                raise DataError(
                    f"{', '.join(of_image[:5])} of {annotations} are all of the image {file_name}",
                    rule="its objects would be split over them",
                    fix="name images and annotation files alike",
                )
    return [each for each in found if len(by_image[each.name]) == 1]


def _files(annotations: Path, images: Path, names: Path | None) -> list[Path]:
    for folder in (annotations, images):
        if not folder.is_dir():
            raise DataError(f"folder {folder} is not there", rule="VOC has a folder of XML files and one of images")
    if names is None:
        files = sorted(path for path in annotations.iterdir() if path.suffix.lower() == ".xml" and path.is_file())
    else:
        files = [annotations / f"{name}.xml" for name in sorted(_names(names, annotations))]
    if not files:
        raise DataError(f"{names or annotations} names no image", rule="at least one XML file is needed")
    return files


def _names(file: Path, annotations: Path) -> set[str]:
    names = set()
    for line in read_lines(file, "list "):
        parts = line.split()
        # Lists of a single class have 1 or -1 behind each name; other names hold spaces themselves.
        if len(parts) > 1 and not (annotations / f"{line.strip()}.xml").is_file():
            raise DataError(f"a line of {file}", value=" ".join(parts), rule="it holds one name, as in Main/train.txt")
        names |= {check_file_name(line.strip(), f"list {file}")} if parts else set()
    return names


class _VocImages:
    """A folder of images, by their names without endings."""

    def __init__(self, path: Path) -> None:
        self.folder = ImageFolder(path)
        self._of_stem: dict[str, list[str]] = defaultdict(list)
        for name in sorted(os.listdir(path)):
            stem, suffix = os.path.splitext(name)
            if suffix.lower() in IMAGE_SUFFIXES:
                self._of_stem[stem].append(name)

    def find(self, path: Path, inner: str) -> tuple[str, int]:
        """The image of an annotation file, and its bytes.

        By the annotation's own name first: the name inside is often that of an image before it was renamed. Where
        several images have the annotation's name, the one inside chooses.
        """
        last = inner.replace("\\", "/").rpartition("/")[2]
        alike = self._of_stem.get(path.stem, [])
        if len(alike) > 1 and last not in alike:
            raise DataError(
                f"{path} has the images {', '.join(alike)}",
                value=inner,
                rule="its <filename> must be one of them",
                fix="remove those that are not meant",
            )
        wanted = last if len(alike) > 1 else alike[0] if alike else last
        if wanted and (found := self.folder.find(wanted)) is not None:
            return found
        raise DataError(
            f"image of {path} is not there",
            value=str(self.folder.path / f"{path.stem}.jpg"),
            rule="images have the names of the XML files",
        )


def _parsed_entry(path: Path, folder: _VocImages, door: ClassNames) -> _Parsed:
    root = _annotation(path)
    name, num_bytes = folder.find(path, root.findtext("filename", "").strip())
    height, width = (_side(root.findtext(f"size/{side}", ""), f"{side} of {path}") for side in ("height", "width"))
    objects = tuple(_object(node, f"object {i} of {path}", door) for i, node in enumerate(root.iter("object"), 1))
    return _Parsed(path, name, num_bytes, (height, width), objects)


def _annotation(path: Path) -> ElementTree.Element:
    root = _parsed(path)
    for node in root.iter():
        # Of a file with a namespace every tag begins with it.
        node.tag = node.tag.rpartition("}")[2]
    if root.tag != "annotation":
        # A page of an error, saved as XML, would be an image without objects.
        raise DataError(
            f"annotation file {path} holds <{root.tag[:40]}>",
            rule="VOC's begin with <annotation>",
            fix="export it again",
        )
    return root


def _parsed(path: Path) -> ElementTree.Element:
    try:
        content = path.read_bytes()
    except OSError:
        raise DataError(f"annotation file {path} cannot be read", fix="check the list and the folder") from None
    try:
        try:
            return ElementTree.fromstring(content)
        # Expat knows few encodings; Python knows the others (GBK, Shift-JIS, EUC-KR) that tools declare.
        except (ValueError, LookupError):
            declared = _DECLARED.search(content)
            if declared is None:
                raise
            return ElementTree.fromstring(content[declared.end() :].decode(declared[1].decode("ascii")))
    except (ElementTree.ParseError, ValueError, LookupError, RecursionError) as error:
        raise DataError(f"annotation file {path} is no XML", value=str(error), fix="export it again") from None


def _side(text: str, owner: str) -> int | None:
    """A side in px; ``None`` where it is left out, or 0, as many tools do."""
    text = text.strip()
    number = float(text) if _DECIMAL.fullmatch(text) else 0.0
    if text and not (_DECIMAL.fullmatch(text) and number.is_integer()):
        raise DataError(owner, value=text, rule="it is a whole number of pixels", fix="correct it, or leave it empty")
    return int(number) or None


def _object(node: ElementTree.Element, owner: str, door: ClassNames) -> VocObject:
    if not node.findtext("name", "").strip():
        raise DataError(f"{owner} has no name", fix="correct or remove it")
    name = door.cleaned(node.findtext("name", ""), owner)
    left, top, right, bottom = (_number(node, f"bndbox/{side}", owner) for side in ("xmin", "ymin", "xmax", "ymax"))
    difficult = node.findtext("difficult", "0").strip()
    if difficult not in ("", "0", "1"):
        raise DataError(f"{owner} has difficult", value=difficult, rule="it is 0 or 1", fix="correct it")
    return VocObject(name, (left - 1, top - 1, right - left + 1, bottom - top + 1), difficult == "1")


def _number(node: ElementTree.Element, path: str, owner: str) -> float:
    text = node.findtext(path, "").strip()
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DataError(f"{owner} has {path}", value=text, rule="it is a number of pixels", fix="correct or remove it")
    return value


def classes_of(entries: Sequence[VocEntry]) -> list[str]:
    """Names of all objects, sorted."""
    return sorted({item.name for entry in entries for item in entry.objects})
