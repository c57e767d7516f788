"""A packed sample and its class, drawn."""

from __future__ import annotations

import PIL.Image

from piip_scale.data.reading.decoding import decode_labelled
from piip_scale.data.reading.sample_set import SampleSet
from piip_scale.tasks.drawing import DrawingStyle, draw_names


def draw_label(shards: SampleSet, number: int, style: DrawingStyle) -> PIL.Image.Image:
    """The image with the name of its class.

    Raises:
        DataError: The sample is damaged.
    """
    labelled = decode_labelled(shards.read(number), len(shards.classes))
    return draw_names(labelled.pixels, [(labelled.label, shards.classes[labelled.label])], style)
