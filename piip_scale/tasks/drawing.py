"""Pictures of detections: boxes, masks, names and scores, several images on one sheet."""

from __future__ import annotations

import colorsys
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pycocotools.mask as coco_mask
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from piip_scale.data.reading.mask_checks import mask_columns
from piip_scale.tasks.base import Detections
from piip_scale.tasks.lettering import Font, Lettering, lettering

Pixels = NDArray[np.uint8]
Rgb = tuple[int, int, int]
_Place = tuple[float, float, float, float]

_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2
_MASK_OPACITY = 0.45
_MOST_NAMES = 6
_LEAST_EDGE_PX, _MOST_EDGE_PX = 640, 2048
_BACKGROUND: Rgb = (250, 250, 250)
_TEXT: Rgb = (30, 30, 30)
_IGNORED: Rgb = (150, 150, 150)


@dataclass(frozen=True)
class DrawingStyle:
    """Sizes of a drawing, in px of the picture.

    Attributes:
        long_edge_px: Images are scaled to it, so that small ones stay readable.
        text_px: Height of letters.
        line_px: Width of a box's outline.
        gap_px: Between images of a sheet, and around them.
        min_score: Detections below it are left out.
        scores: Write scores behind class names; ground truth has none worth writing.
        by_instance: A colour and an outline for each object, not for each class: neighbours of one class stay apart.
        names_once: Name the largest object of each class alone: colours identify the others, and nothing is hidden.
    """

    long_edge_px: int = 640
    text_px: int = 15
    line_px: int = 2
    gap_px: int = 10
    min_score: float = 0.5
    scores: bool = True
    by_instance: bool = False
    names_once: bool = False

    @classmethod
    def of_picture(cls, size_px: tuple[int, int], **chosen: Any) -> DrawingStyle:
        """For a picture of its own: near the image's height and width, lines and letters to match."""
        long_edge_px = min(max(*size_px, _LEAST_EDGE_PX), _MOST_EDGE_PX)
        text_px, line_px = max(15, long_edge_px // 70), max(2, long_edge_px // 500)
        return cls(long_edge_px=long_edge_px, text_px=text_px, line_px=line_px, by_instance=True, **chosen)


def draw_detections(
    image: Pixels, found: Detections, classes: Sequence[str], style: DrawingStyle | None = None
) -> Image.Image:
    """An image with what was found in it.

    Args:
        image: RGB, uint8 (H, W, 3).
        found: Detections in its pixels.
        classes: Names in label order.
        style: Sizes; the default where ``None``.
    """
    style = style or DrawingStyle()
    scale = style.long_edge_px / max(image.shape[:2])
    shown = [index for index, score in enumerate(found.scores.tolist()) if score >= style.min_score]
    picture = _scaled(image, style)
    boxes = [[edge * scale for edge in found.boxes_xyxy_px[index].tolist()] for index in shown]
    labels = [int(found.labels[index]) for index in shown]
    colours = [class_colour(number if style.by_instance else label) for number, label in enumerate(labels)]
    if found.masks_rle is not None:
        outline_px = style.line_px if style.by_instance else 0
        for index, colour in reversed([*zip(shown, colours, strict=True)]):
            _paint_mask(picture, found.masks_rle[index], colour, outline_px)
    draw = ImageDraw.Draw(picture)
    for box, colour in reversed([*zip(boxes, colours, strict=True)]):
        draw.rectangle(box, outline=colour, width=style.line_px)
    # Names come last and best first, each where it hides no other.
    taken: list[_Place] = []
    named = _largest_of_each(boxes, labels) if style.names_once else range(len(shown))
    for number in named:
        score = f" {found.scores[shown[number]].item():.2f}" if style.scores else ""
        name = lettering(classes[labels[number]] + score, style.text_px)
        place = _free_place(name.width_px, boxes[number], picture.size, style, taken)
        _write_tag(draw, name, place, colours[number])
        taken.append(place)
    return picture


def draw_regions(picture: Image.Image, boxes_xyxy_px: Sequence[Sequence[float]], scale: float) -> None:
    """Outlines regions to ignore in grey.

    Args:
        picture: Drawn on.
        boxes_xyxy_px: In pixels of the image that the picture was made of.
        scale: Picture over image.
    """
    draw = ImageDraw.Draw(picture)
    for box in boxes_xyxy_px:
        draw.rectangle([edge * scale for edge in box], outline=_IGNORED)


def _largest_of_each(boxes: Sequence[Sequence[float]], labels: Sequence[int]) -> list[int]:
    """The number of the largest box of each label."""
    areas = [(right - left) * (bottom - top) for left, top, right, bottom in boxes]
    largest: dict[int, int] = {}
    for number in sorted(range(len(boxes)), key=lambda number: -areas[number]):
        largest.setdefault(labels[number], number)
    return sorted(largest.values())


def draw_names(image: Pixels, names: Sequence[tuple[int, str]], style: DrawingStyle | None = None) -> Image.Image:
    """An image with names at its top left, one below the other.

    Args:
        image: RGB, uint8 (H, W, 3).
        names: A label, for the colour, and a text each.
        style: Sizes; the default where ``None``.
    """
    style = style or DrawingStyle()
    picture = _scaled(image, style)
    draw = ImageDraw.Draw(picture)
    for row, (label, text) in enumerate(names):
        name = lettering(text, style.text_px)
        width, height = name.width_px + 6, style.text_px + 5
        _write_tag(draw, name, (0, row * height, width, height), class_colour(label))
    return picture


def draw_label_map(
    image: Pixels, labels: Pixels, classes: Sequence[str], style: DrawingStyle | None = None
) -> Image.Image:
    """An image with the classes of its pixels over it, and the names of the largest at its top left.

    Args:
        image: RGB, uint8 (H, W, 3).
        labels: uint8 (H, W); values that are no label stay as the image is.
        classes: Names in label order.
        style: Sizes; the default where ``None``.
    """
    style = style or DrawingStyle()
    counts = np.bincount(labels.ravel(), minlength=len(classes))[: len(classes)]
    mixed = np.array(image)
    # A class at a time: in float32 a photograph takes gigabytes.
    for label in np.flatnonzero(counts).tolist():
        inside = labels == label
        blend = (1 - _MASK_OPACITY) * mixed[inside] + _MASK_OPACITY * np.array(class_colour(label))
        mixed[inside] = blend.astype(np.uint8)
    largest = [int(label) for label in np.argsort(-counts, kind="stable")[:_MOST_NAMES] if counts[label]]
    names = [(label, f"{classes[label]} {counts[label] / labels.size:.0%}") for label in largest]
    return draw_names(mixed, names, style)


def contact_sheet(
    pictures: Sequence[Image.Image], caption: str, columns: int = 2, style: DrawingStyle | None = None
) -> Image.Image:
    """Pictures in rows on one sheet, over a caption.

    Args:
        pictures: At least one.
        caption: Below them; lines that are too long are broken.
        columns: Pictures in a row.
        style: Sizes; the default where ``None``.
    """
    style = style or DrawingStyle()
    columns = min(columns, len(pictures))
    rows = [pictures[start : start + columns] for start in range(0, len(pictures), columns)]
    cell = max(picture.width for picture in pictures)
    heights = [max(picture.height for picture in row) for row in rows]
    width = columns * (cell + style.gap_px) + style.gap_px
    title = lettering(caption, style.text_px)
    lines = list(_broken(title.text, width - 2 * style.gap_px, title.font))
    line_px = round(style.text_px * 1.4)
    height = sum(heights) + style.gap_px * (len(rows) + 2) + line_px * len(lines)
    sheet = Image.new("RGB", (width, height), _BACKGROUND)
    top = style.gap_px
    for row, row_height in zip(rows, heights, strict=True):
        for column, picture in enumerate(row):
            sheet.paste(picture, (style.gap_px + column * (cell + style.gap_px), top))
        top += row_height + style.gap_px
    ImageDraw.Draw(sheet).multiline_text(
        (style.gap_px, top), "\n".join(lines), fill=_TEXT, font=title.font, spacing=line_px - style.text_px
    )
    return sheet


def png_bytes(picture: Image.Image) -> bytes:
    """A picture as the content of a PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def class_colour(label: int) -> Rgb:
    """A colour for a class, far from those of the labels next to it."""
    hue = (0.02 + label * _GOLDEN_RATIO) % 1
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.85, (0.95, 0.7)[label // 8 % 2])
    return round(red * 255), round(green * 255), round(blue * 255)


def _scaled(image: Pixels, style: DrawingStyle) -> Image.Image:
    height, width = image.shape[:2]
    scale = style.long_edge_px / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)


def _paint_mask(picture: Image.Image, rle: dict[str, Any], colour: Rgb, outline_px: int = 0) -> None:
    """Blends a mask into the picture, reading no more columns of it than it covers."""
    height, width = rle["size"]
    left, _, across, _ = coco_mask.toBbox(rle).tolist()
    if not across:
        return
    scale = picture.width / width
    # How far pixels of one side reach into those of the other, in px of the mask.
    reach = max(1, 1 / scale)
    first = max(math.floor((left - reach) * scale), 0)
    last = min(math.ceil((left + across + reach) * scale), picture.width)
    begin, end = max(math.floor(first / scale - reach), 0), min(math.ceil(last / scale + reach), width)
    # Turned over its diagonal, as run lengths are: turning all of it would read it across the memory.
    mask = Image.fromarray(mask_columns(rle, begin, end) * np.uint8(round(255 * _MASK_OPACITY)))
    box = (0, first / scale - begin, height, min(last / scale, width) - begin)
    small = mask.resize((picture.height, last - first), Image.Resampling.BILINEAR, box)
    shade = small.transpose(Image.Transpose.TRANSPOSE)
    picture.paste(colour, (first, 0), shade)
    if outline_px:
        inside = shade.point([255 * (level > 255 * _MASK_OPACITY / 2) for level in range(256)])
        within = inside.filter(ImageFilter.MinFilter(2 * outline_px + 1))
        picture.paste(colour, (first, 0), ImageChops.subtract(inside, within))


def _free_place(
    text_width_px: float,
    box: Sequence[float],
    picture_size: tuple[int, int],
    style: DrawingStyle,
    taken: Sequence[_Place],
) -> _Place:
    """Where a name goes, as left, top, width and height: at its box, inside the picture, over no other if possible."""
    width, height = text_width_px + 6, style.text_px + 5
    limit_x, limit_y = picture_size[0] - width, picture_size[1] - height
    left, top, right, bottom = box
    # Above the box, below it, inside at the top, and both again at its right end.
    corners = [
        (left, top - height),
        (left, bottom),
        (left, top),
        (right - width, top - height),
        (right - width, bottom),
    ]
    places = [(max(min(x, limit_x), 0), max(min(y, limit_y), 0), width, height) for x, y in corners]
    free = [place for place in places if not any(_overlap(place, other) for other in taken)]
    return (free or places)[0]


def _write_tag(draw: ImageDraw.ImageDraw, name: Lettering, place: _Place, colour: Rgb) -> None:
    x, y, width, height = place
    draw.rectangle((x, y, x + width, y + height), fill=colour)
    luminance = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
    letters = "black" if luminance > 140 else "white"
    draw.text((x + 3, y + height / 2), name.text, fill=letters, font=name.font, anchor="lm")


def _overlap(one: _Place, other: _Place) -> bool:
    return all(one[axis] < other[axis] + other[axis + 2] and other[axis] < one[axis] + one[axis + 2] for axis in (0, 1))


def _broken(text: str, width_px: float, font: Font) -> Iterator[str]:
    for paragraph in text.splitlines():
        line = ""
        for word in paragraph.split():
            longer = f"{line} {word}".strip()
            if line and font.getlength(longer) > width_px:
                yield line
                longer = word
            line = longer
        yield line
