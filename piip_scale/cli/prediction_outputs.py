"""Where what was found in photographs goes: one sheet of pictures, or a folder of pictures and results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from piip_scale.errors import DataError

if TYPE_CHECKING:
    import PIL.Image

    from piip_scale.data.images import Image
    from piip_scale.data.photos import Photo
    from piip_scale.tasks.base import Predictor
    from piip_scale.tasks.result_files import Format, ResultFile

_MOST_ON_A_SHEET = 100
_PICTURE = ".png"

Report = Callable[[str], None]


class Outputs(Protocol):
    """What becomes of predictions, one by one."""

    def add(self, photo: Photo, pixels: Image, found: Any) -> None:
        """Takes what was found in one photograph."""
        ...

    def close(self) -> None:
        """Writes what is written as a whole."""
        ...


class Sheet:
    """All pictures on one sheet, and what was found as JSON: ``Outputs``.

    Args:
        out: The PNG to write.
        predictor: Draws.
        json_out: Where to write all that was found; ``None`` to keep it.
        report: Is given a line on each photograph.
    """

    def __init__(self, out: Path, predictor: Predictor, json_out: Path | None, report: Report) -> None:
        from piip_scale.tasks.result_files import JsonResults

        self._out, self._predictor, self._report = out, predictor, report
        self._json = JsonResults(json_out, predictor) if json_out else None
        self._pictures: list[PIL.Image.Image] = []
        self._names: list[str] = []

    def add(self, photo: Photo, pixels: Image, found: Any) -> None:
        """As in ``Outputs``."""
        if self._json:
            self._json.add(_looked(photo, photo.stem, pixels, found))
        if len(self._pictures) < _MOST_ON_A_SHEET:
            self._pictures.append(self._predictor.draw(pixels, found))
            self._names.append(photo.path.name)
        elif len(self._pictures) == len(self._names):
            self._names.append("...")
            self._report(f"the sheet holds the first {_MOST_ON_A_SHEET}: --out DIR draws a picture of each")
        self._report(f"{photo.name}: {self._predictor.summary(found)}")

    def close(self) -> None:
        """As in ``Outputs``."""
        from piip_scale.data.reading.files import write_bytes
        from piip_scale.tasks.drawing import contact_sheet, png_bytes

        if self._pictures:
            write_bytes(self._out, png_bytes(contact_sheet(self._pictures, ", ".join(self._names))))
            self._report(f"picture: {self._out}")
        if self._json and self._pictures:
            self._json.write()


class Folder:
    """A picture a photograph, and files of results, in one folder: ``Outputs``.

    Args:
        out: The folder.
        predictor: Draws.
        results: Already opened in it.
        pictures: Draw pictures.
        report: Is given a line on each photograph.
    """

    def __init__(
        self, out: Path, predictor: Predictor, results: Sequence[ResultFile], *, pictures: bool, report: Report
    ) -> None:
        self._out, self._predictor, self._results = out, predictor, results
        self._pictures, self._report, self._is_empty = pictures, report, True
        # As file systems that know no case see them.
        self._taken = {Path(name).stem.casefold() for one in results for name in one.names}

    def add(self, photo: Photo, pixels: Image, found: Any) -> None:
        """As in ``Outputs``.

        Raises:
            DataError: The photograph lies where pictures go, or the disk refuses.
        """
        from piip_scale.data.reading.files import write_bytes
        from piip_scale.tasks.drawing import DrawingStyle, png_bytes

        if photo.path.resolve().parent == self._out.resolve():
            raise DataError(f"--out {self._out} holds the photograph {photo.path}", fix="choose another folder")
        stem, self._is_empty = self._free(photo.stem), False
        for one in self._results:
            one.add(_looked(photo, stem, pixels, found))
        line = f"{photo.name}: {self._predictor.summary(found)}"
        if self._pictures:
            picture = self._predictor.draw(pixels, found, DrawingStyle.of_picture(pixels.shape[:2]))
            write_bytes(self._out / f"{stem}{_PICTURE}", png_bytes(picture), durable=False)
            line += f" -> {self._out / stem}{_PICTURE}"
        self._report(line)

    def close(self) -> None:
        """As in ``Outputs``."""
        if self._is_empty:
            return
        for one in self._results:
            one.write()
        self._report(f"results: {', '.join(str(self._out / name) for one in self._results for name in one.names)}")

    def _free(self, stem: str) -> str:
        """The name, numbered where another photograph has it."""
        tries = (stem if number == 1 else f"{stem}-{number}" for number in range(1, len(self._taken) + 2))
        free = next(name for name in tries if name.casefold() not in self._taken)
        self._taken.add(free.casefold())
        return free


def check_target(out: Path, json_out: Path | None, *, overwrite: bool) -> None:
    """Refuses what would replace a user's files, or be no picture.

    Raises:
        DataError: A file is there, a folder is not empty, or the name ends otherwise.
    """
    if is_sheet(out) and out.suffix.lower() != _PICTURE:
        raise DataError("--out", value=str(out), rule="pictures are written as .png, or into a folder")
    if json_out is not None and not is_sheet(out):
        raise DataError("--json", value=str(json_out), rule="it goes with one sheet", fix="give --format json")
    there = [path for path in (out, json_out) if path and (path.is_file() or (path.is_dir() and any(path.iterdir())))]
    if there and not overwrite:
        raise DataError(f"{there[0]} is there already", fix="choose another place, or replace it with --overwrite")


def is_sheet(out: Path) -> bool:
    """Whether a path means one file; one without an ending, or that is a folder, means a folder."""
    return bool(out.suffix) and not out.is_dir()


def open_folder(
    out: Path,
    predictor: Predictor,
    formats: Sequence[Format],
    *,
    is_detector: bool,
    coco_ids: Path | None,
    pictures: bool,
    report: Report,
) -> Folder:
    """A folder for pictures and results of some formats.

    Raises:
        DataError: A format does not fit the model, or ``coco_ids`` cannot be used.
    """
    from piip_scale.tasks.result_files import open_results

    results = [
        open_results(kind, out, predictor, is_detector=is_detector, coco_ids=coco_ids)
        for kind in dict.fromkeys(formats)
    ]
    return Folder(out, predictor, results, pictures=pictures, report=report)


def _looked(photo: Photo, stem: str, pixels: Image, found: Any) -> Any:
    from piip_scale.tasks.result_files import Looked

    return Looked(photo.name, stem, (pixels.shape[0], pixels.shape[1]), found)
