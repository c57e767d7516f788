"""What is found in a large image takes memory as the image does, however many objects or classes there are."""

import numpy as np
import pycocotools.mask as coco_mask
import pytest
import torch
from peak_memory import MB, peak_of
from PIL import Image
from torch import nn

from piip_scale.data.reading.mask_checks import mask_columns
from piip_scale.errors import ConfigError
from piip_scale.tasks.base import Detections
from piip_scale.tasks.detection import mask_results
from piip_scale.tasks.detection.mask_results import encode_masks, encode_when_pasted, paste_and_encode
from piip_scale.tasks.drawing import DrawingStyle, class_colour, draw_detections, draw_label_map
from piip_scale.tasks.mmlab import MODELS, ConfigDict
from piip_scale.tasks.segmentation.sliding import label_map

HEIGHT, WIDTH, MASKS, CLASSES = 1500, 2000, 40, 60
SIDE = 28


def mask_head(**settings) -> nn.Module:
    return MODELS.build(
        dict(type="FCNMaskHead", num_convs=1, in_channels=4, conv_out_channels=4, num_classes=2, **settings)
    )


def encoding_head(**settings) -> nn.Module:
    head = mask_head(**settings)
    encode_when_pasted(head)
    return head


def boxes_in(height, width, count, generator):
    """Most of them across edges by up to half a pixel; some whole, some without an extent."""
    corners = (torch.rand(count, 2, 2, generator=generator) * 1.4 - 0.2) * torch.tensor([width, height])
    boxes = torch.cat([corners.min(1).values, corners.max(1).values], 1)
    boxes[0] = torch.tensor([0.0, 0, width, height])
    boxes[1, 2], boxes[2, 3] = boxes[1, 0], boxes[2, 1]
    boxes[3] = boxes[3, :2].repeat(2)
    return boxes.clamp(min=-0.5).minimum(torch.tensor([width, height] * 2) + 0.5)


def found_by(head, boxes, scores, size_px, *, threshold=0.5, rescale=True):
    """As mmdet calls it: boxes in the network's pixels."""
    scale = torch.tensor([0.7, 0.9])
    scaled = boxes * scale.repeat(2)
    labels = torch.arange(len(boxes)) % 2
    meta = {"scale_factor": tuple(scale.tolist()), "ori_shape": size_px}
    found = head._predict_by_feat_single(scores, scaled, labels, meta, ConfigDict(mask_thr_binary=threshold), rescale)
    return found, scaled


def pasted(head, count=MASKS):
    """Boxes of a large image."""
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(count, 2, generator=generator) * 1200
    boxes = torch.cat([corners, corners + 40 + torch.rand(count, 2, generator=generator) * 200], 1)
    scores = torch.randn(count, 2, SIDE, SIDE, generator=generator)
    return found_by(head, boxes, scores, (HEIGHT, WIDTH))


@pytest.fixture(scope="module")
def encoded():
    head = encoding_head()
    return lambda count=MASKS: pasted(head, count)


@pytest.mark.parametrize("strip_px", [9, 1 << 19])
@pytest.mark.parametrize("settings", [{}, {"class_agnostic": True}])
@pytest.mark.parametrize(("height", "width"), [(1, 90), (90, 1), (61, 83), (200, 33)])
def test_masks_made_in_their_boxes_are_those_that_mmdet_pastes(height, width, settings, strip_px, monkeypatch):
    monkeypatch.setattr(mask_results, "_CPU_STRIP_PX", strip_px)
    generator = torch.Generator().manual_seed(height)
    boxes = boxes_in(height, width, 12, generator)
    scores = torch.randn(12, 2, SIDE, SIDE, generator=generator) * 2
    # All inside, so that runs go on from column to column; none inside.
    scores[0], scores[4] = 20, -20
    whole, in_boxes = mask_head(**settings), encoding_head(**settings)
    for threshold, rescale in ((0.5, True), (0.5, False), (0.1, True), (0.9, True)):
        masks, expected = found_by(whole, boxes, scores, (height, width), threshold=threshold, rescale=rescale)
        runs, given = found_by(in_boxes, boxes, scores, (height, width), threshold=threshold, rescale=rescale)
        assert runs == encode_masks(masks)
        assert torch.equal(given, expected)


def test_a_box_outside_of_the_image_has_an_empty_mask():
    runs = paste_and_encode(torch.ones(SIDE, SIDE), torch.tensor([70.0, 5, 90, 20]), (40, 50), 0.5)
    assert not coco_mask.decode(runs).any()
    assert coco_mask.decode(runs).shape == (40, 50)


@pytest.mark.parametrize("threshold", [-1, 0, 1.5])
def test_masks_are_cut_at_a_score(threshold):
    head = mask_head()
    head.test_cfg = ConfigDict(mask_thr_binary=threshold)
    with pytest.raises(ConfigError, match="mask_thr_binary"):
        encode_when_pasted(head)


def test_many_masks_take_the_memory_of_few(encoded):
    encoded(2)
    # A single one that is pasted over the image is four copies of 3 MB.
    assert peak_of(encoded) < 40 * MB < 4 * MASKS * HEIGHT * WIDTH


def test_masks_are_drawn_one_at_a_time(encoded):
    runs, boxes = encoded()
    found = Detections(1, boxes, torch.ones(MASKS), torch.zeros(MASKS).long(), runs)
    image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    assert peak_of(lambda: draw_detections(image, found, ["a"])) < 60 * MB


def test_a_mask_is_drawn_as_if_it_were_read_whole():
    random = np.random.default_rng(0)
    for _ in range(30):
        height, width = random.integers(1, 900, 2).tolist()
        mask = np.zeros((height, width), np.uint8)
        (top, bottom), (left, right) = (sorted(random.integers(0, side + 1, 2).tolist()) for side in (height, width))
        mask[top:bottom, left:right] = random.random((bottom - top, right - left)) < 0.9
        (rle,) = encode_masks(torch.from_numpy(mask[None]))
        first, last = sorted(random.integers(0, width + 1, 2).tolist())
        assert np.array_equal(mask_columns(rle, first, last).T, mask[:, first:last])
        found = Detections(1, torch.zeros(1, 4), torch.ones(1), torch.zeros(1).long(), [rle])
        drawn = draw_detections(np.full((height, width, 3), 90, np.uint8), found, ["a"], DrawingStyle(line_px=0))
        alone = Image.new("L", drawn.size)
        alone.paste(255, (0, 0), Image.fromarray(mask * 115).resize(drawn.size, Image.Resampling.BILINEAR))
        colour, blend = np.array(class_colour(0)), np.asarray(alone)[..., None] / 255
        expected = np.full((*blend.shape[:2], 3), 90) * (1 - blend) + colour * blend
        untagged = np.ones(blend.shape[:2], bool)
        untagged[:25, :80] = False
        assert np.abs(np.asarray(drawn) - expected)[untagged].max(initial=0) <= 2


def test_classes_are_scaled_one_at_a_time():
    scores = torch.randn(CLASSES, 75, 100, generator=torch.Generator().manual_seed(0))
    whole = nn.functional.interpolate(scores[None], (150, 190), mode="bilinear", align_corners=False)[0].argmax(0)
    assert torch.equal(label_map(scores, (150, 190)), whole.to(torch.uint8))
    assert peak_of(lambda: label_map(scores, (HEIGHT, WIDTH))) < 120 * MB < 4 * CLASSES * HEIGHT * WIDTH


def test_a_label_map_is_drawn_in_bytes():
    image = np.full((HEIGHT, WIDTH, 3), 90, np.uint8)
    labels = np.arange(HEIGHT * WIDTH, dtype=np.int64).reshape(HEIGHT, WIDTH) // 50_000 % CLASSES
    names = [f"class {label}" for label in range(CLASSES)]
    small = labels.astype(np.uint8)
    assert peak_of(lambda: draw_label_map(image, small, names)) < 90 * MB
