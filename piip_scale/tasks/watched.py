"""The same few validation images, drawn at each evaluation of a training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import PIL.Image

from piip_scale.agreement import gathered_on_main, on_main
from piip_scale.data.images import Image
from piip_scale.data.reading.sample_set import SampleSet
from piip_scale.errors import DataError
from piip_scale.logging import get_logger
from piip_scale.tasks.cases import draw_sample, jpeg_bytes
from piip_scale.tasks.drawing import DrawingStyle

DrawFound = Callable[[Image, Any, DrawingStyle], PIL.Image.Image]
"""Draws what was found on an image's pixels."""

# Some 25 kB a picture, of which an event file gets a few at each evaluation. A detector at its beginning is unsure of
# all that it finds.
_STYLE = DrawingStyle(long_edge_px=320, text_px=11, min_score=0.3, gap_px=4)


def watched_numbers(samples: SampleSet, pictures: int | Sequence[str]) -> list[int]:
    """The samples to watch: so many, evenly spread over the set, or those of these keys.

    Raises:
        DataError: The set has no sample of a key.
    """
    if isinstance(pictures, int):
        number = min(pictures, len(samples))
        return [(2 * place + 1) * len(samples) // (2 * number) for place in range(number)]
    places = {str(key): number for number, key in enumerate(samples.keys)}
    for key in pictures:
        if key not in places:
            raise DataError(
                "config key telemetry.pictures",
                value=key,
                rule=f"it names samples of {samples.location}, as {samples.keys[0]!r}",
            )
    return [places[key] for key in pictures]


class WatchedSamples:
    """What is found in a few samples: a ``Watched``.

    Args:
        samples: The validation set.
        numbers: Of the samples in it.
        draw: Draws what was found.
    """

    def __init__(self, samples: SampleSet, numbers: Sequence[int], draw: DrawFound) -> None:
        self._samples, self._draw = samples, draw
        self._number_of = {samples.notes(number)["image_id"]: number for number in numbers}
        self._found: dict[int, Any] = {}

    def keep(self, predictions: Sequence[Any]) -> None:
        """Keeps what is found in these samples; an image seen before, as at a padded end, counts once."""
        for found in predictions:
            if found.image_id in self._number_of:
                self._found.setdefault(found.image_id, found)

    def pictures(self) -> dict[str, bytes]:
        """Truth beside prediction as JPEG files, by the samples' keys, on rank 0; nothing elsewhere. Collective."""
        found: dict[int, Any] = {}
        for part in gathered_on_main(self._found):
            found = part | found
        drawn: dict[str, bytes] = {}
        on_main(lambda: drawn.update(self._drawn(found)))
        return drawn

    def _drawn(self, found: Mapping[int, Any]) -> dict[str, bytes]:
        drawn = {}
        for image_id, number in self._number_of.items():
            if image_id not in found:
                # A neighbour took the place of a sample that is broken.
                continue
            draw = partial(self._draw_found, found[image_id])
            try:
                case = draw_sample(self._samples, number, draw, _STYLE)
            except DataError as error:
                # No picture is worth a training; where a set is gone, its next batch ends it.
                get_logger(__name__).warning("no picture of %s: %s", self._samples.keys[number], error.line)
                continue
            drawn[case.key] = jpeg_bytes(case.beside())
        return drawn

    def _draw_found(self, found: Any, pixels: Image, style: DrawingStyle) -> PIL.Image.Image:
        return self._draw(pixels, found, style)
