"""Drawings show boxes, masks and names where they belong, also on small images and sheets."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from piip_scale.tasks.base import Detections
from piip_scale.tasks.detection.mask_results import encode_masks
from piip_scale.tasks.drawing import DrawingStyle, class_colour, contact_sheet, draw_detections, draw_regions

GREY = np.full((60, 80, 3), 90, np.uint8)
NAMES = ("disc", "box", "star")


def _found(boxes, scores, labels, masks=None):
    return Detections(
        1,
        torch.tensor(boxes, dtype=torch.float32).view(-1, 4),
        torch.tensor(scores),
        torch.tensor(labels, dtype=torch.long),
        masks,
    )


def _near(pixel, colour, tolerance=12):
    return np.abs(np.asarray(pixel, int) - np.asarray(colour)).max() <= tolerance


def test_a_small_image_is_scaled_up_and_boxes_with_it():
    picture = draw_detections(GREY, _found([[20, 20, 60, 50]], [0.9], [1]), NAMES, DrawingStyle(long_edge_px=640))
    assert picture.size == (640, 480)
    pixels = np.asarray(picture)
    assert _near(pixels[300, 160], class_colour(1))  # the left edge, at 20 * 8
    assert _near(pixels[400, 300], class_colour(1))  # the bottom edge, at 50 * 8
    assert _near(pixels[300, 320], (90, 90, 90))  # the middle stays as it was


def test_masks_are_translucent_and_only_where_they_are():
    mask = torch.zeros(1, 60, 80, dtype=torch.bool)
    mask[0, 20:50, 20:40] = True
    picture = draw_detections(GREY, _found([[20, 20, 60, 50]], [0.9], [2], encode_masks(mask)), NAMES)
    pixels = np.asarray(picture).astype(int)
    inside, outside = pixels[280, 240], pixels[280, 400]
    assert _near(outside, (90, 90, 90))
    blend = (0.55 * 90 + 0.45 * np.array(class_colour(2))).round()
    assert _near(inside, blend, tolerance=3)


def test_weak_detections_and_empty_ones_leave_the_image_alone():
    style = DrawingStyle(long_edge_px=80, min_score=0.5)
    nothing = draw_detections(GREY, _found([], [], []), NAMES, style)
    weak = draw_detections(GREY, _found([[20, 20, 60, 50]], [0.4], [0]), NAMES, style)
    assert np.array_equal(np.asarray(nothing), GREY)
    assert np.array_equal(np.asarray(weak), GREY)


def test_the_largest_of_each_class_is_named_and_regions_to_ignore_are_grey():
    boxes = [[2, 40, 12, 50], [30, 20, 60, 50], [64, 40, 76, 52]]
    style = DrawingStyle(long_edge_px=640, scores=False, names_once=True)
    once = draw_detections(GREY, _found(boxes, [1.0] * 3, [0, 0, 1]), NAMES, style)
    alone = draw_detections(GREY, _found(boxes[1:], [1.0] * 2, [0, 1]), NAMES, style)
    # But for its box, which lies left of 13 * 8, the smaller disc leaves no trace.
    assert np.array_equal(np.asarray(once)[:, 104:], np.asarray(alone)[:, 104:])
    assert not np.array_equal(np.asarray(once), np.asarray(alone))
    draw_regions(once, [[2, 2, 10, 10]], 8)
    assert _near(np.asarray(once)[16, 40], (150, 150, 150), tolerance=0)


def test_names_stay_inside_the_picture_and_apart():
    boxes = [[0, 0, 30, 20], [1, 0, 31, 20], [70, 50, 80, 60], [-5, -5, 2, 2]]
    picture = draw_detections(GREY, _found(boxes, [0.9, 0.8, 0.7, 0.6], [0, 1, 2, 0]), NAMES)
    pixels = np.asarray(picture)
    # Each tag is a solid ground of its class's colour, larger than a box's outline could be.
    for label in range(3):
        hits = (np.abs(pixels.astype(int) - class_colour(label)) <= 2).all(-1).sum()
        assert hits > 500


@pytest.mark.parametrize("num_classes", [3, 8, 16])
def test_colours_of_classes_differ(num_classes):
    colours = np.array([class_colour(label) for label in range(num_classes)], float)
    distances = [np.abs(a - b).max() for a, b in itertools.combinations(colours, 2)]
    assert min(distances) > 25


def test_a_sheet_holds_every_picture_and_the_caption():
    pictures = [Image.new("RGB", (100, 60 + 10 * k), (10 * k, 0, 0)) for k in range(3)]
    style = DrawingStyle(gap_px=10)
    sheet = contact_sheet(pictures, "a caption " * 20, style=style)
    pixels = np.asarray(sheet)
    assert sheet.width == 2 * 100 + 3 * 10
    assert tuple(pixels[15, 15]) == (0, 0, 0)
    assert tuple(pixels[15, 125]) == (10, 0, 0)
    assert tuple(pixels[95, 15]) == (20, 0, 0)
    below = pixels[10 + 70 + 10 + 80 + 10 :]
    lines = (below.min((1, 2)) < 100).astype(int)
    assert (np.diff(lines) == 1).sum() >= 3  # it was broken into lines
    assert below[:, -10:].min() > 200  # and nothing runs out of the sheet


def test_neighbours_of_one_class_are_told_apart_by_colour_and_outline():
    masks = torch.zeros(2, 60, 80, dtype=torch.bool)
    masks[0, 20:50, 10:40], masks[1, 20:50, 40:70] = True, True
    found = _found([[10, 20, 40, 50], [40, 20, 70, 50]], [0.9, 0.8], [1, 1], encode_masks(masks))
    style = DrawingStyle.of_picture((60, 80))
    pixels = np.asarray(draw_detections(GREY, found, NAMES, style)).astype(int)
    insides = [pixels[280, x] for x in (200, 440)]
    assert np.abs(insides[0] - insides[1]).max() > 40
    # Without the boxes: the outline alone is in the full colour.
    outlined = np.asarray(draw_detections(GREY, found, NAMES, replace(style, min_score=0.85)))
    assert _near(outlined[280, 80 + style.line_px - 1], class_colour(0))
    assert DrawingStyle.of_picture((5000, 4000)).long_edge_px == 2048
