"""Images too large for one look: tiles cover them, and each object comes once, with its mask."""

from itertools import pairwise

import numpy as np
import pycocotools.mask as coco_mask
import pytest
import torch
from scipy import ndimage

from piip_scale.errors import ConfigError
from piip_scale.tasks.base import Detections
from piip_scale.tasks.detection.mask_results import encode_masks, moved_mask
from piip_scale.tasks.detection.tiling import Tiling, Window, merge, predict_in_tiles, windows

SIZE_PX = (230, 310)


def found(boxes, scores=None, labels=None, masks=None):
    count = len(boxes)
    return Detections(
        1,
        torch.tensor(boxes, dtype=torch.float32).view(-1, 4),
        torch.tensor(scores if scores is not None else [0.5] * count),
        torch.tensor(labels if labels is not None else [0] * count, dtype=torch.long),
        masks,
    )


@pytest.mark.parametrize("size_px", [(50, 40), (100, 100), (101, 100), (999, 140), (230, 310)])
@pytest.mark.parametrize("overlap", [0.0, 0.2, 0.75])
def test_tiles_cover_an_image_and_overlap_as_asked(size_px, overlap):
    seen = np.zeros(size_px, int)
    tiles = windows(size_px, Tiling(100, overlap))
    for at in tiles:
        assert at.right - at.left == min(100, size_px[1])
        assert at.bottom - at.top == min(100, size_px[0])
        seen[at.top : at.bottom, at.left : at.right] += 1
    assert seen.min() == 1
    for axis in ("left", "top"):
        starts = sorted({getattr(at, axis) for at in tiles})
        assert all(b - a <= 100 * (1 - overlap) + 1 for a, b in pairwise(starts))


def blobs(pixels):
    """A perfect detector of a few px or more: each connected part, scored better the less of it is seen."""
    parts, count = ndimage.label(pixels[..., 0])
    masks = np.stack([parts == n for n in range(1, count + 1)]) if count else np.zeros((0, *parts.shape), bool)
    boxes = [[s[1].start, s[0].start, s[1].stop, s[0].stop] for s in ndimage.find_objects(parts)]
    scores = [1 / (1 + float(mask.sum())) for mask in masks]
    labels = [int(pixels[mask][0, 0]) // 100 for mask in masks]
    return found(boxes, scores, labels, encode_masks(torch.from_numpy(masks)))


def test_objects_on_borders_come_once_with_their_whole_masks():
    image = np.zeros((*SIZE_PX, 3), np.uint8)
    image[90:110, 60:75] = 100  # across an edge of tiles, whole in another
    image[60:75, 85:99] = 200  # ends where a tile does
    image[5:15, 5:15] = 100
    image[150:226, 20:300] = 100  # larger than any tile
    image[228:230, 309:310] = 200
    batches = []

    def look(images):
        batches.append(len(images))
        return [blobs(pixels) for pixels in images]

    merged, whole = predict_in_tiles(look, image, Tiling(100, 0.3), 4), blobs(image)
    assert max(batches) == 4
    order = np.lexsort(merged.boxes_xyxy_px.numpy().T)
    expected = np.lexsort(whole.boxes_xyxy_px.numpy().T)
    assert len(order) == 5
    assert torch.equal(merged.boxes_xyxy_px[order], whole.boxes_xyxy_px[expected])
    assert torch.equal(merged.labels[order], whole.labels[expected])
    assert [merged.masks_rle[n] for n in order] == [whole.masks_rle[n] for n in expected]
    assert torch.equal(merged.scores, merged.scores.sort(descending=True).values)


def test_an_image_of_one_tile_is_looked_at_once():
    looked = []
    predict_in_tiles(lambda images: looked.extend(images) or [found([])], np.zeros((90, 100, 3), np.uint8), Tiling(100))
    assert len(looked) == 1


def test_neighbours_other_classes_and_what_one_look_saw_stay():
    looks = [Window(0, 0, 100, 100), Window(80, 0, 180, 100)]
    left = found([[82, 10, 92, 20], [82, 10, 92, 21], [82, 50, 92, 60]], [0.9, 0.8, 0.7], [0, 0, 1])
    right = found([[2, 10, 12, 20], [10, 50, 17, 60], [2, 50, 12, 60]], [0.6, 0.5, 0.4], [0, 1, 2])
    merged = merge([left, right], looks, (100, 180))
    # The first of the right is the first of the left; its second a neighbour; its third of another class.
    assert merged.scores.tolist() == pytest.approx([0.9, 0.8, 0.7, 0.5, 0.4])


def test_the_larger_fragment_stays_of_what_no_look_saw_whole():
    looks = [Window(0, 0, 100, 100), Window(80, 0, 180, 100)]
    merged = merge([found([[50, 10, 100, 30]], [0.3]), found([[0, 10, 15, 30]], [0.9])], looks, (100, 180))
    assert merged.boxes_xyxy_px.tolist() == [[50, 10, 100, 30]]


@pytest.mark.parametrize("fill", [0, 1])
def test_masks_move_with_their_tile(fill):
    generator = np.random.default_rng(0)
    for height, width in ((1, 1), (7, 5), (30, 41)):
        mask = generator.random((height, width)) < 0.6 if fill else np.zeros((height, width), bool)
        (rle,) = encode_masks(torch.from_numpy(mask[None]))
        whole = np.zeros((50, 60), np.uint8)
        whole[11 : 11 + height, 13 : 13 + width] = mask
        moved = moved_mask(rle, (13, 11), (50, 60))
        assert np.array_equal(coco_mask.decode(moved), whole)
        assert moved == encode_masks(torch.from_numpy(whole[None].astype(bool)))[0]


@pytest.mark.parametrize(("tile", "overlap"), [(0, 0.2), (10, 1.0), (10, -0.1), (10, float("nan"))])
def test_tiles_that_cannot_be_laid_are_refused(tile, overlap):
    with pytest.raises(ConfigError, match=r"--tile|--overlap"):
        Tiling(tile, overlap)
