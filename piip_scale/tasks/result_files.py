"""What was found in many images as files for other programs: JSON, COCO results, CSV, YOLO."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from piip_scale.data.reading.files import write_bytes
from piip_scale.errors import DataError
from piip_scale.tasks.base import Detections, Predictor

Format = Literal["json", "coco", "csv", "yolo"]
FORMATS: tuple[Format, ...] = get_args(Format)


@dataclass(frozen=True)
class Looked:
    """An image that was looked at.

    Attributes:
        name: What the user calls it.
        stem: What files made of it are called.
        size_px: Height and width.
        found: What the predictor found.
    """

    name: str
    stem: str
    size_px: tuple[int, int]
    found: Any


class ResultFile(Protocol):
    """Results of one format; nothing is on the disk before ``write``, but for formats of a file an image."""

    names: tuple[str, ...]

    def add(self, image: Looked) -> None:
        """One more image."""
        ...

    def write(self) -> None:
        """Writes what was added, whole.

        Raises:
            DataError: The disk refuses.
        """
        ...


@dataclass(frozen=True)
class CocoIds:
    """The numbers by which a COCO file calls its images and classes.

    Attributes:
        images: Image ids by file name.
        categories: Category ids by class name.
    """

    images: Mapping[str, int]
    categories: Mapping[str, int]

    @classmethod
    def read(cls, path: Path, classes: Sequence[str]) -> CocoIds:
        """Those of an annotation file.

        Raises:
            DataError: It is none, or lacks a class.
        """
        from piip_scale.data.packing.coco import load_coco_json

        truth = load_coco_json(path)
        ids = cls(
            {image["file_name"]: image["id"] for image in truth["images"]},
            {category["name"]: category["id"] for category in truth["categories"]},
        )
        if lacking := [name for name in classes if name not in ids.categories]:
            raise DataError(f"{path} has no category of the model's", value=lacking[0], fix="use the set's own file")
        return ids

    def image(self, name: str) -> int:
        """The id of an image by a path to it: the longest end of the path that the file names.

        Raises:
            DataError: There is none.
        """
        parts = Path(name).parts
        ends = ("/".join(parts[start:]) for start in range(len(parts)))
        number = next((self.images[end] for end in ends if end in self.images), None)
        if number is None:
            raise DataError("--coco-ids names no such image", value=name, fix="predict the images of that file only")
        return number


class JsonResults:
    """A list of what was found in each image: a ``ResultFile``."""

    def __init__(self, path: Path, predictor: Predictor) -> None:
        self.names: tuple[str, ...] = (path.name,)
        self._path, self._predictor = path, predictor
        self._entries: list[dict[str, Any]] = []

    def add(self, image: Looked) -> None:
        """As in ``ResultFile``."""
        height, width = image.size_px
        head = {"image": image.name, "width_px": width, "height_px": height}
        self._entries.append(head | self._predictor.entry(image.found))

    def write(self) -> None:
        """As in ``ResultFile``."""
        write_bytes(self._path, f"{json.dumps(self._entries, indent=1)}\n".encode())


class CsvResults:
    """A row an object, or a class: a ``ResultFile``."""

    def __init__(self, path: Path, predictor: Predictor) -> None:
        self.names: tuple[str, ...] = (path.name,)
        self._path, self._predictor = path, predictor
        self._rows: list[dict[str, Any]] = []

    def add(self, image: Looked) -> None:
        """As in ``ResultFile``."""
        self._rows += [{"image": image.name} | row for row in self._predictor.rows(image.found)]

    def write(self) -> None:
        """As in ``ResultFile``."""
        text = io.StringIO(newline="")
        # An image without objects has no row; without any the columns are not known.
        writer = csv.DictWriter(text, list(self._rows[0]) if self._rows else ["image"])
        writer.writeheader()
        writer.writerows(self._rows)
        write_bytes(self._path, text.getvalue().encode())


class CocoResults:
    """COCO's results, which pycocotools scores, and the images and categories that their ids mean: a ``ResultFile``."""

    def __init__(self, folder: Path, classes: Sequence[str], ids: CocoIds | None) -> None:
        self.names: tuple[str, ...] = ("coco_results.json", "coco_images.json")
        self._folder, self._ids = folder, ids
        self._categories = {name: ids.categories[name] if ids else n for n, name in enumerate(classes, 1)}
        self._images: list[dict[str, Any]] = []
        self._results: list[dict[str, Any]] = []

    def add(self, image: Looked) -> None:
        """As in ``ResultFile``.

        Raises:
            DataError: ``ids`` know no such image.
        """
        from piip_scale.tasks.detection.metric import coco_results

        number = self._ids.image(image.name) if self._ids else len(self._images) + 1
        height, width = image.size_px
        self._images.append({"id": number, "file_name": image.name, "width": width, "height": height})
        results = coco_results(image.found, list(self._categories.values()))
        self._results += [result | {"image_id": number} for result in results]

    def write(self) -> None:
        """As in ``ResultFile``."""
        categories = [{"id": number, "name": name} for name, number in self._categories.items()]
        meaning = {"images": self._images, "categories": categories, "annotations": []}
        for name, content in zip(self.names, (self._results, meaning), strict=True):
            write_bytes(self._folder / name, f"{json.dumps(content)}\n".encode())


class YoloResults:
    """A text file an image, a line an object, in shares of the image's sides: a ``ResultFile``."""

    def __init__(self, folder: Path, classes: Sequence[str]) -> None:
        self.names: tuple[str, ...] = ("labels", "classes.txt")
        self._folder, self._classes = folder, classes

    def add(self, image: Looked) -> None:
        """As in ``ResultFile``."""
        found: Detections = image.found
        height, width = image.size_px
        lines = []
        for label, box, score in zip(
            found.labels.tolist(), found.boxes_xyxy_px.tolist(), found.scores.tolist(), strict=True
        ):
            left, top, right, bottom = box[0] / width, box[1] / height, box[2] / width, box[3] / height
            shares = ((left + right) / 2, (top + bottom) / 2, right - left, bottom - top, score)
            lines.append(" ".join([str(label), *(f"{share:.6f}" for share in shares)]) + "\n")
        write_bytes(self._folder / "labels" / f"{image.stem}.txt", "".join(lines).encode(), durable=False)

    def write(self) -> None:
        """As in ``ResultFile``."""
        write_bytes(self._folder / "classes.txt", "".join(f"{name}\n" for name in self._classes).encode())


def open_results(
    kind: Format, folder: Path, predictor: Predictor, *, is_detector: bool, coco_ids: Path | None = None
) -> ResultFile:
    """Results of a format in a folder.

    Raises:
        DataError: The format is of boxes, and the model finds none; or ``coco_ids`` cannot be used.
    """
    if kind == "json":
        return JsonResults(folder / "results.json", predictor)
    if kind == "csv":
        return CsvResults(folder / "results.csv", predictor)
    if not is_detector:
        raise DataError(
            "--format", value=kind, rule="it holds boxes, which only detectors find", fix="json and csv hold all"
        )
    if kind == "yolo":
        return YoloResults(folder, predictor.classes)
    return CocoResults(folder, predictor.classes, CocoIds.read(coco_ids, predictor.classes) if coco_ids else None)
