"""What a packed set holds, as a table and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from piip_scale.cli.plain import plain
from piip_scale.data.reading.files import write_bytes
from piip_scale.data.set_kinds import SET_KINDS

if TYPE_CHECKING:
    from rich.table import Table

    from piip_scale.data.reading.shards import ShardSet

_COLUMNS = 4


def summary_table(shards: ShardSet) -> Table:
    """A set's numbers, one row each.

    Raises:
        DataError: A shard is gone or its annotations are damaged.
    """
    from rich.table import Table

    table = Table(title=plain(shards.location), show_header=False)
    for name, text in SET_KINDS[shards.manifest.kind].load("summary")(shards):
        table.add_row(plain(name), plain(text))
    return table


def draw_contact_sheet(shards: ShardSet, out: Path, num_images: int) -> None:
    """Draws samples spread evenly over a set, with their boxes and masks, label map or class, into one PNG.

    Raises:
        DataError: A sample is damaged, or the picture cannot be written.
    """
    from piip_scale.tasks.drawing import DrawingStyle, contact_sheet, png_bytes

    style = DrawingStyle(long_edge_px=360, text_px=12, scores=False, names_once=True)
    numbers = np.unique(np.linspace(0, len(shards) - 1, min(num_images, len(shards))).round().astype(int)).tolist()
    draw = SET_KINDS[shards.manifest.kind].load("picture")
    pictures = [draw(shards, number, style) for number in numbers]
    caption = f"{len(numbers)} of {len(shards)} images: " + ", ".join(shards.keys[numbers])
    write_bytes(out, png_bytes(contact_sheet(pictures, caption, _COLUMNS, style)))
