"""What is found in a large image takes memory as the image does, however many objects or classes there are."""

import numpy as np
import pycocotools.mask as coco_mask
import pytest
import torch
from peak_memory import MB, peak_of
from torch import nn

from piip_scale.tasks.base import Detections
from piip_scale.tasks.detection.mask_results import encode_when_pasted
from piip_scale.tasks.drawing import draw_detections, draw_label_map
from piip_scale.tasks.mmlab import MODELS, ConfigDict
from piip_scale.tasks.segmentation.sliding import label_map

HEIGHT, WIDTH, MASKS, CLASSES = 1500, 2000, 40, 60


def mask_head() -> nn.Module:
    return MODELS.build(dict(type="FCNMaskHead", num_convs=1, in_channels=4, conv_out_channels=4, num_classes=1))


def pasted(head, count=MASKS):
    """As mmdet calls it: boxes in the network's pixels, which are half of the image's."""
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(count, 2, generator=generator) * 600
    boxes = torch.cat([corners, corners + 20 + torch.rand(count, 2, generator=generator) * 100], 1)
    meta = {"scale_factor": (0.5, 0.5), "ori_shape": (HEIGHT, WIDTH)}
    scores = torch.randn(count, 1, 28, 28, generator=generator)
    settings = ConfigDict(mask_thr_binary=0.5)
    found = head._predict_by_feat_single(scores, boxes, torch.zeros(count).long(), meta, settings, True)
    return found, boxes


@pytest.fixture(scope="module")
def encoded():
    head = mask_head()
    encode_when_pasted(head)
    return lambda count=MASKS: pasted(head, count)


def test_masks_that_are_encoded_at_once_are_those_that_were(encoded):
    (runs, boxes), (masks, expected) = encoded(5), pasted(mask_head(), 5)
    assert torch.equal(boxes, expected)
    assert np.array_equal(np.stack([coco_mask.decode(rle) for rle in runs]), masks.numpy().astype(np.uint8))


def test_many_masks_take_the_memory_of_few(encoded):
    encoded(2)
    # All at once they are four copies of 3 MB each.
    assert peak_of(encoded) < 100 * MB < 4 * MASKS * HEIGHT * WIDTH


def test_masks_are_drawn_one_at_a_time(encoded):
    runs, boxes = encoded()
    found = Detections(1, boxes * 2, torch.ones(MASKS), torch.zeros(MASKS).long(), runs)
    image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    assert peak_of(lambda: draw_detections(image, found, ["a"])) < 60 * MB


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
