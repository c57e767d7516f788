"""Predicting photographs: what was found as pictures and as files of results, an image or a batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

from piip_scale.errors import DataError

if TYPE_CHECKING:
    from piip_scale.cli.prediction_outputs import Outputs
    from piip_scale.data.images import Image
    from piip_scale.data.photos import Photo
    from piip_scale.serving.looking import Looker

_SOME_FAILED = 1

Report = Callable[[str], None]


@dataclass
class Tally:
    """How many photographs were predicted, and what was wrong with those that were not."""

    done: int = 0
    failures: list[str] = field(default_factory=list)

    def check(self) -> None:
        """Raises for photographs that could not be read: exit code 1 where others could, 2 where none could.

        Raises:
            DataError: There are some.
        """
        if not self.failures:
            return
        total = self.done + len(self.failures)
        error = DataError(f"{len(self.failures)} of {total} images could not be predicted: {self.failures[-1]}")
        if self.done:
            error.exit_code = _SOME_FAILED
        raise error


def predict_photos(looker: Looker, photos: Iterable[Photo], outputs: Outputs, batch_size: int, report: Report) -> Tally:
    """Predicts photographs in their order; those that cannot be read are reported and passed by.

    Args:
        looker: The model.
        photos: What it looks at; no more than a batch is in memory.
        outputs: What becomes of what it finds; written also where this is interrupted.
        batch_size: So many are looked at together.
        report: Is given a line on each that is passed by.

    Raises:
        DataError: Outputs cannot be written.
    """
    tally = Tally()
    try:
        for some in _chunks(photos, batch_size):
            readable = list(_read(some, tally, report))
            found = looker.look([pixels for _, pixels in readable]) if readable else []
            for (photo, pixels), one in zip(readable, found, strict=True):
                outputs.add(photo, pixels, one)
                tally.done += 1
    finally:
        outputs.close()
    return tally


def _read(photos: Iterable[Photo], tally: Tally, report: Report) -> Iterator[tuple[Photo, Image]]:
    from piip_scale.data.images import ImageError

    for photo in photos:
        try:
            yield photo, photo.read()
        except ImageError as error:
            tally.failures.append(error.line)
            report(f"passed by: {error.line}")


def _chunks(photos: Iterable[Photo], size: int) -> Iterator[list[Photo]]:
    stream = iter(photos)
    while some := list(islice(stream, size)):
        yield some
