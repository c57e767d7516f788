"""A packed sample and its label map, drawn."""

from __future__ import annotations

import PIL.Image

from piip_scale.data.reading.label_maps import decode_mapped
from piip_scale.data.reading.sample_set import SampleSet
from piip_scale.tasks.drawing import DrawingStyle, draw_label_map


def draw_map(shards: SampleSet, number: int, style: DrawingStyle) -> PIL.Image.Image:
    """The image with the classes of its pixels over it.

    Raises:
        DataError: The sample is damaged.
    """
    mapped = decode_mapped(shards.read(number), shards.map_rule)
    return draw_label_map(mapped.pixels, mapped.labels, shards.classes, style)
