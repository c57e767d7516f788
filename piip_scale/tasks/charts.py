"""Charts of an evaluation: precision by recall, and which classes are taken for which."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from piip_scale.tasks.drawing import class_colour
from piip_scale.tasks.lettering import lettering

Floats = npt.NDArray[np.float64]

_WHITE, _BLACK, _GREY = (255, 255, 255), (0, 0, 0), (205, 205, 205)
_TEXT_PX, _GAP_PX = 15, 12
_PLOT_PX = (640, 440)
_MOST_NAMED = 16
_TICKS = 5
_CELLS_PX, _LEAST_CELL_PX, _MOST_CELL_PX = 900, 6, 44
# Below it a share does not fit into its cell.
_CELL_WITH_TEXT_PX = 30
_HOT = np.array([20, 70, 150])


def draw_curves(precision_RK: Floats, classes: Sequence[str], title: str) -> Image.Image:
    """Precision by recall of each class, and their mean in black; the first classes are named, with their means.

    Args:
        precision_RK: At recalls evenly spaced from 0 to 1; -1 for a class without objects.
        classes: Their names.
        title: Above it.
    """
    known = [k for k in range(len(classes)) if precision_RK[:, k].max(initial=-1) > -1]
    entries = [(_BLACK, "mean", precision_RK[:, known].mean(1) if known else np.zeros(len(precision_RK)))]
    entries += [(class_colour(k), classes[k], precision_RK[:, k]) for k in known]
    named = [(colour, f"{name}  {values.mean():.3f}") for colour, name, values in entries[: _MOST_NAMED + 1]]
    if len(entries) > len(named):
        named.append((_GREY, f"and {len(entries) - len(named)} more"))
    left, top = 60, 62
    width = left + _PLOT_PX[0] + 2 * _GAP_PX + 30 + int(max(_width(text) for _, text in named))
    picture = Image.new("RGB", (width, top + max(_PLOT_PX[1], 22 * len(named)) + 60), _WHITE)
    draw = ImageDraw.Draw(picture)
    _write(draw, (_GAP_PX, _GAP_PX), title)
    _draw_axes(draw, left, top)
    for colour, name, values in reversed(entries):
        points = [_place(left, top, r / (len(values) - 1), float(value)) for r, value in enumerate(values)]
        draw.line(points, fill=colour, width=4 if name == "mean" else 2)
    for row, (colour, text) in enumerate(named):
        x, y = left + _PLOT_PX[0] + _GAP_PX, top + 22 * row
        draw.rectangle((x, y + 3, x + 18, y + 13), fill=colour)
        _write(draw, (x + 26, y), text)
    return picture


def draw_confusion(counts: npt.NDArray[np.int64], names: Sequence[str], title: str) -> Image.Image:
    """What each true class (row) was taken for (column), as shares of its row; percent where they have room.

    Args:
        counts: int64 (K, K).
        names: Of rows and columns.
        title: Above it.
    """
    cell = int(np.clip(_CELLS_PX // max(len(names), 1), _LEAST_CELL_PX, _MOST_CELL_PX))
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    text_px = min(_TEXT_PX, max(cell - 1, _LEAST_CELL_PX))
    margin = _GAP_PX + int(max(_width(name, text_px) for name in names)) + 6
    top = 40 + margin
    side = cell * len(names)
    width = max(margin + side + _GAP_PX, int(_width(title)) + 2 * _GAP_PX)
    picture = Image.new("RGB", (width, top + side + _GAP_PX), _WHITE)
    draw = ImageDraw.Draw(picture)
    _write(draw, (_GAP_PX, _GAP_PX), title)
    colours = (255 - shares[..., None] * (255 - _HOT)).round().astype(np.uint8)
    cells = Image.fromarray(colours).resize((side, side), Image.Resampling.NEAREST)
    picture.paste(cells, (margin, top))
    draw.rectangle((margin - 1, top - 1, margin + side, top + side), outline=_GREY)
    for place, name in enumerate(names):
        _write(draw, (_GAP_PX, top + place * cell + (cell - text_px) // 2 - 1), name, text_px)
        picture.paste(_upright(name, text_px, margin), (margin + place * cell + (cell - text_px) // 2 - 2, 40))
    if cell >= _CELL_WITH_TEXT_PX:
        for row, column in np.argwhere(counts > 0).tolist():
            text = f"{100 * shares[row, column]:.0f}"
            colour = _WHITE if shares[row, column] > 0.5 else _BLACK
            at = margin + column * cell + (cell - _width(text)) / 2, top + row * cell + (cell - _TEXT_PX) / 2 - 2
            _write(draw, at, text, colour=colour)
    return picture


def _draw_axes(draw: ImageDraw.ImageDraw, left: int, top: int) -> None:
    for tick in range(_TICKS + 1):
        share = tick / _TICKS
        draw.line([_place(left, top, 0, share), _place(left, top, 1, share)], fill=_GREY)
        draw.line([_place(left, top, share, 0), _place(left, top, share, 1)], fill=_GREY)
        x, y = _place(left, top, share, 0)
        _write(draw, (x - 10, y + 6), f"{share:.1f}")
        x, y = _place(left, top, 0, share)
        _write(draw, (x - 32, y - 9), f"{share:.1f}")
    _write(draw, (left + _PLOT_PX[0] - 50, top + _PLOT_PX[1] + 28), "recall")
    _write(draw, (_GAP_PX, top - 28), "precision")


def _place(left: int, top: int, recall: float, precision: float) -> tuple[float, float]:
    return left + recall * _PLOT_PX[0], top + (1 - precision) * _PLOT_PX[1]


def _upright(text: str, text_px: int, height: int) -> Image.Image:
    """A text from bottom to top."""
    line = Image.new("RGB", (height - 6, text_px + 5), _WHITE)
    _write(ImageDraw.Draw(line), (0, 0), text, text_px)
    return line.rotate(90, expand=True)


def _width(text: str, text_px: int = _TEXT_PX) -> float:
    return lettering(text, text_px).width_px


def _write(
    draw: ImageDraw.ImageDraw,
    place: tuple[float, float],
    text: str,
    text_px: int = _TEXT_PX,
    colour: tuple[int, int, int] = _BLACK,
) -> None:
    name = lettering(text, text_px)
    draw.text(place, name.text, fill=colour, font=name.font)
