"""The annotations of a COCO file, checked one by one: boxes, masks, and what is ignored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from piip_scale.data.packing.coco_entries import Categories, Entry
from piip_scale.data.packing.coco_file import stray_note
from piip_scale.data.packing.door import whole_number
from piip_scale.data.packing.problems import Problems
from piip_scale.data.reading.decoding import MIN_BOX_PX
from piip_scale.data.reading.mask_checks import box_of, checked_segmentation, is_number, reaches_into
from piip_scale.errors import DataError

OVERHANG_TOLERANCE_PX = 1.0
"""Annotation tools round: a box may stick out by less than this and is clipped without being asked."""

# What was done to annotations, for the log.
_DONE = {
    "clipped": "clipped {} boxes that stuck out of their image",
    "dropped": "dropped {} of which nothing was left",
    "renumbered": "numbered {} annotations anew, which had no id or another's",
    "boxed": "took {} boxes from masks",
    "flagged": "{} annotations are ignored by their ignore flag",
    "areas": "{} annotations are ignored, as mmdet does, for an area of 0 or less (without the key it is the box's)",
    "parts": "left out {} parts of masks that are no polygons",
    "others": "left out {} annotations of other classes",
}


class NoteChecker:
    """Checks annotations one by one and counts what it mended.

    Attributes:
        done: How often, by the keys of ``_DONE``.
    """

    def __init__(
        self, file: Path, categories: Categories, problems: Problems, *, clip_boxes: bool, boxes_only: bool
    ) -> None:
        self._file, self._problems = file, problems
        self._known, self._chosen = categories.known, frozenset(c["id"] for c in categories.chosen)
        self._clip_boxes, self._boxes_only = clip_boxes, boxes_only
        self.done: Counter[str] = Counter()

    def by_image(
        self, notes: Sequence[dict[str, Any]], entries: Sequence[Entry], image_ids: Container[int | None]
    ) -> dict[int, list[dict[str, Any]]]:
        """Checked annotations under the id of their image.

        Args:
            notes: All of the file.
            entries: The images that are packed.
            image_ids: Of all images of the file, broken ones too.
        """
        by_id = {entry.image_id: entry for entry in entries}
        found: dict[int, list[dict[str, Any]]] = {key: [] for key in by_id}
        for note, key in zip(notes, self._ids(notes), strict=True):
            with self._problems.collected("annotation"):
                image_id = whole_number(note.get("image_id"))
                if image_id is None or image_id not in image_ids:
                    raise stray_note(self._file, note)
                # Of an image that is broken itself there is nothing to check against.
                if image_id in by_id and (checked := self._note(note, key, by_id[image_id])) is not None:
                    found[image_id].append(checked)
        return found

    def report(self) -> str:
        """What was done to annotations, in one line; empty where nothing was."""
        return ", ".join(_DONE[key].format(self.done[key]) for key in _DONE if self.done[key])

    def _ids(self, notes: Sequence[dict[str, Any]]) -> list[int]:
        """Ids of annotations, new ones for those that have none or another's: nothing else refers to them."""
        ids: list[int | None] = []
        seen: set[int] = set()
        for note in notes:
            key = whole_number(note.get("id"))
            ids.append(None if key is None or key in seen else key)
            if key is not None:
                seen.add(key)
        following = max(seen, default=-1)
        numbered = []
        for key in ids:
            if key is None:
                following, key = following + 1, following + 1
                self.done["renumbered"] += 1
            numbered.append(key)
        return numbered

    def _note(self, note: dict[str, Any], key: int, image: Entry) -> dict[str, Any] | None:
        category = whole_number(note.get("category_id"))
        if category is None or category not in self._known:
            known = ", ".join(map(str, sorted(self._known)[:20]))
            raise self._error(
                f"annotation {key} has category id {note.get('category_id')!r}",
                f"the known ids are {known}",
                "add the category or correct the id",
            )
        if category not in self._chosen:
            self.done["others"] += 1
            return None
        mask = self._segmentation(note, key, image)
        box = self._box(note, key, image, mask)
        if box is None:
            self.done["dropped"] += 1
            return None
        checked = {"id": key, "category_id": category, "bbox": box} | self._area_and_crowd(note, key, box)
        if mask is None or self._boxes_only:
            return checked
        is_target = not checked["iscrowd"] and min(box[2:]) >= MIN_BOX_PX
        if is_target and not reaches_into(mask, box):
            raise self._error(
                f"annotation {key} of image {image.image_id} has a mask that does not reach into its box {box}",
                "a mask and its box are of one object",
            )
        return checked | {"segmentation": mask}

    def _area_and_crowd(self, note: dict[str, Any], key: int, box: list[float]) -> dict[str, Any]:
        area = note.get("area")
        is_crowd, is_flagged = (self._flag(note, name, key) for name in ("iscrowd", "ignore"))
        is_empty = is_number(area) and area <= 0
        if not is_crowd:
            self.done["flagged"] += is_flagged
            self.done["areas"] += is_empty and not is_flagged
        area = float(area) if is_number(area) and not is_empty else box[2] * box[3]
        return {"area": area, "iscrowd": int(is_crowd or is_flagged or is_empty)}

    def _flag(self, note: dict[str, Any], name: str, key: int) -> bool:
        value = note.get(name)
        if isinstance(value, bool) or value is None:
            return bool(value)
        # Of the text "0" Python would make a crowd, which training leaves out.
        number = whole_number(value)
        if number not in (0, 1):
            raise self._error(f"annotation {key} has {name} {value!r}", "it is 0 or 1")
        return bool(number)

    def _box(self, note: dict[str, Any], key: int, image: Entry, mask: Any) -> list[float] | None:
        box = note.get("bbox")
        if box in (None, []) and mask is not None:
            box = box_of(mask)
            self.done["boxed"] += box is not None
        if not isinstance(box, list) or len(box) != 4 or not all(is_number(side) for side in box):
            raise self._error(f"annotation {key} has bbox {box!r}", "it is four finite numbers x, y, width, height")
        x, y, width, height = map(float, box)
        if (width <= 0 or height <= 0) and not self._clip_boxes:
            raise self._error(
                f"annotation {key} of image {image.image_id} has the empty box {box}",
                "width and height are above 0",
                "correct it, or drop such boxes with --clip-boxes",
            )
        return self._clipped((x, y, width, height), key, image)

    def _clipped(self, box: tuple[float, float, float, float], key: int, image: Entry) -> list[float] | None:
        (x, y, width, height), (height_px, width_px) = box, image.size_px
        left, top = max(x, 0.0), max(y, 0.0)
        right, bottom = min(x + width, width_px), min(y + height, height_px)
        overhang = max(-x, -y, x + width - width_px, y + height - height_px)
        is_empty = right <= left or bottom <= top
        if (overhang >= OVERHANG_TOLERANCE_PX or is_empty) and not self._clip_boxes:
            raise self._error(
                f"annotation {key} has the box {[*box]} outside image {image.image_id}",
                f"that image ({image.name}) is {width_px} x {height_px} px",
                "correct it, or clip such boxes with --clip-boxes",
            )
        if is_empty:
            return None
        if overhang <= 0:
            return [x, y, width, height]
        self.done["clipped"] += 1
        return [left, top, right - left, bottom - top]

    def _segmentation(self, note: dict[str, Any], key: int, image: Entry) -> Any:
        """The mask, as it is stored; ``None`` where there is none or nobody wants it."""
        value = note.get("segmentation")
        if not value or (self._boxes_only and note.get("bbox")):
            return None
        try:
            mask = checked_segmentation(value, *image.size_px)
            if isinstance(mask, dict) and box_of(mask) is None:
                raise ValueError("no pixel is inside")
        except ValueError as error:
            if isinstance(value, Mapping) and isinstance(value.get("counts"), str):
                name = f"{self._file}: mask of annotation {key} of image {image.image_id} ({image.name})"
                raise DataError(f"{name} cannot be decoded", value=str(error), fix="correct or remove it") from None
            height, width = image.size_px
            raise self._error(
                f"annotation {key} has a segmentation that cannot be read ({error})",
                f"it is polygons of at least 3 points, or run lengths of size [{height}, {width}]",
            ) from None
        if isinstance(value, list) and mask is not None:
            self.done["parts"] += len(value) - len(mask)
        return mask

    def _error(self, problem: str, rule: str, fix: str = "correct or remove it") -> DataError:
        return DataError(f"{self._file}: {problem}", rule=rule, fix=fix)
