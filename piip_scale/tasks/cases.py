"""Images that an evaluation went best and worst on, drawn with the truth beside what was found."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import PIL.Image

from piip_scale.data.images import Image
from piip_scale.data.reading.decoding import decode_pixels
from piip_scale.data.reading.files import write_bytes
from piip_scale.data.reading.sample_set import SampleSet
from piip_scale.data.set_kinds import SET_KINDS
from piip_scale.errors import DataError
from piip_scale.tasks.drawing import DrawingStyle

if TYPE_CHECKING:
    from piip_scale.tasks.report import Report

Draw = Callable[[Image, DrawingStyle], PIL.Image.Image]
"""Draws what was found on an image's pixels."""
MOST_CASES = 6
"""Of the best, and of the worst."""
_STYLE = DrawingStyle(long_edge_px=512, text_px=17, min_score=0.0)
_QUALITY = 82


@dataclass(frozen=True)
class Case:
    """An image of an evaluation.

    Attributes:
        image_id: The image's.
        score: How it went, 0 to 1, the higher the better.
        words: The same for people.
        draw: What was found, drawn on the image's pixels.
    """

    image_id: int
    score: float
    words: str
    draw: Draw


@dataclass(frozen=True)
class DrawnCase:
    """A case as a page shows it.

    Attributes:
        key: The sample's name in its set.
        words: How it went.
        truth: What is on it.
        found: What was found.
    """

    key: str
    words: str
    truth: PIL.Image.Image
    found: PIL.Image.Image

    def beside(self) -> PIL.Image.Image:
        """Both as one picture, the truth on the left."""
        size = self.truth.width + self.found.width, max(self.truth.height, self.found.height)
        both = PIL.Image.new("RGB", size)
        both.paste(self.truth, (0, 0))
        both.paste(self.found, (self.truth.width, 0))
        return both


def best_and_worst(cases: Iterable[Case]) -> tuple[list[Case], list[Case]]:
    """The best cases, best first, and the worst, worst first; none is in both."""
    ranked = sorted(cases, key=lambda case: -case.score)
    num_best = min(MOST_CASES, (len(ranked) + 1) // 2)
    return ranked[:num_best], ranked[num_best:][::-1][:MOST_CASES]


def draw_cases(cases: Sequence[Case], samples: SampleSet) -> list[DrawnCase]:
    """The cases, drawn; an image that cannot be read is left out.

    Args:
        cases: Of images of the set.
        samples: The set.
    """
    numbers = _numbers(samples, {case.image_id for case in cases})
    return [
        drawn for case in cases if case.image_id in numbers and (drawn := _drawn(case, samples, numbers[case.image_id]))
    ]


def drawn_cases(report: Report, samples: SampleSet) -> tuple[list[DrawnCase], list[DrawnCase]]:
    """A report's best and worst cases, drawn."""
    best, worst = best_and_worst(report.cases)
    return draw_cases(best, samples), draw_cases(worst, samples)


def _numbers(samples: SampleSet, image_ids: set[int]) -> Mapping[int, int]:
    found: dict[int, int] = {}
    for number, image_id in enumerate(_image_ids(samples)):
        if image_id in image_ids:
            found[image_id] = number
            if len(found) == len(image_ids):
                break
    return found


def _image_ids(samples: SampleSet) -> Iterator[int]:
    for number in range(len(samples)):
        yield samples.notes(number)["image_id"]


def _drawn(case: Case, samples: SampleSet, number: int) -> DrawnCase | None:
    try:
        return draw_sample(samples, number, case.draw, _STYLE, case.words)
    except DataError:
        # It was counted and told as broken while the set was looked at.
        return None


def draw_sample(
    samples: SampleSet,
    number: int,
    draw: Draw,
    style: DrawingStyle,
    words: str = "",
) -> DrawnCase:
    """A sample's truth, and what was found in it.

    Args:
        samples: Its set.
        number: Its place there.
        draw: Draws what was found on its pixels.
        style: Of both.
        words: How it went.

    Raises:
        DataError: The sample cannot be read.
    """
    truth = SET_KINDS[samples.kind].load("picture")(samples, number, replace(style, scores=False))
    found = draw(decode_pixels(samples.read(number)), style)
    return DrawnCase(str(samples.keys[number]), words, truth, found)


def write_pictures(folder: Path, best: Sequence[DrawnCase], worst: Sequence[DrawnCase]) -> None:
    """Writes drawn cases as ``worst_1.jpg``, ``best_1.jpg`` and so on, the truth beside what was found.

    Raises:
        DataError: The disk is full, or the folder cannot be written.
    """
    for name, cases in (("worst", worst), ("best", best)):
        for number, case in enumerate(cases, 1):
            write_bytes(folder / f"{name}_{number}.jpg", jpeg_bytes(case.beside()))


def jpeg_bytes(image: PIL.Image.Image) -> bytes:
    """A picture as the content of a JPEG file, small rather than exact."""
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=_QUALITY)
    return buffer.getvalue()
