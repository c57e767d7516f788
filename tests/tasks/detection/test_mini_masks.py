"""Mini-masks against supersampled truth and against mmdet's own bitmaps and polygons."""

import copy

import cv2
import numpy as np
import pycocotools.mask as coco_mask
import pytest
import torch

from piip_scale.data.augment.geometry import Geometry, Window
from piip_scale.data.augment.masks import Shapes
from piip_scale.errors import KernelError
from piip_scale.tasks.detection.mini_masks import MiniMasks
from piip_scale.tasks.mmlab import BitmapMasks, InstanceData

from mmdet.structures.mask import PolygonMasks  # isort: skip

SIDE = 240


def _polygon(rng):
    angle = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    radius = rng.uniform(8, 50) * (1 + 0.3 * np.sin(3 * angle + rng.uniform(0, 6)) + 0.1 * np.sin(7 * angle))
    centre = rng.uniform(60, SIDE - 60, 2)
    return np.stack([centre[0] + radius * np.cos(angle), centre[1] + radius * np.sin(angle)], 1)


def _coverage(polygon, box, size, samples):
    """Share of each of size x size cells over the box that the polygon covers."""
    fine = size * samples
    points = (polygon - box[:2]) / (box[2:] - box[:2]) * fine - 0.5
    image = np.zeros((fine, fine), np.uint8)
    cv2.fillPoly(image, [np.round(points * 256).astype(np.int32)], 1, shift=8)
    return image.reshape(size, samples, size, samples).mean((1, 3))


def _shapes(count=60):
    rng = np.random.default_rng(0)
    polygons = [_polygon(rng) for _ in range(count)]
    boxes = np.array([[*p.min(0), *p.max(0)] for p in polygons], np.float32)
    shift = rng.normal(0, 0.08, (count, 4)) * np.tile(boxes[:, 2:] - boxes[:, :2], 2)
    proposals = np.clip(boxes + shift, 0, SIDE).astype(np.float32)
    window = Window(0, 0, SIDE, SIDE)
    shapes = Shapes([[p.ravel().tolist()] for p in polygons], window)
    cells = shapes.mini_masks(range(count), boxes.astype(float), Geometry(window, (SIDE, SIDE)))
    masks = MiniMasks(torch.from_numpy(cells), torch.from_numpy(boxes), SIDE, SIDE)
    return polygons, masks, proposals


def _bitmaps(polygons):
    rles = [coco_mask.merge(coco_mask.frPyObjects([p.flatten().tolist()], SIDE, SIDE)) for p in polygons]
    return np.stack([coco_mask.decode(rle) for rle in rles])


def _mean_iou(masks, truth):
    masks = np.asarray(masks, bool)
    return ((masks & truth).sum((1, 2)) / (masks | truth).sum((1, 2))).mean()


def test_targets_are_closer_to_the_truth_than_bitmaps_and_polygons():
    polygons, masks, proposals = _shapes()
    # So fine that filling what an edge touches, as cv2 does, adds nothing that counts.
    truth = np.stack([_coverage(p, b, 28, 64) >= 0.5 for p, b in zip(polygons, proposals, strict=True)])
    inds = np.arange(len(polygons))
    bitmaps_of_image = _bitmaps(polygons)
    bitmaps = BitmapMasks(bitmaps_of_image, SIDE, SIDE).crop_and_resize(proposals, (28, 28), inds, "cpu")
    outlines = PolygonMasks([[p.flatten()] for p in polygons], SIDE, SIDE).crop_and_resize(
        proposals, (28, 28), inds, "cpu"
    )
    mine = _mean_iou(masks.crop_and_resize(proposals, (28, 28), inds).masks, truth)
    assert mine > 0.996
    assert masks.masks_NSS.numel() < 0.25 * bitmaps_of_image.nbytes
    assert mine >= _mean_iou(bitmaps.to_ndarray(), truth)
    assert mine >= _mean_iou(outlines.to_ndarray(), truth)


def test_soft_targets_are_the_covered_share():
    polygons, masks, proposals = _shapes(20)
    soft = masks.crop_and_resize(proposals, (28, 28), np.arange(20), binarize=False).masks
    truth = np.stack([_coverage(p, b, 28, 16) for p, b in zip(polygons, proposals, strict=True)])
    assert np.abs(soft - truth).mean() < 0.005


def test_indices_assign_masks_to_boxes():
    _, masks, proposals = _shapes(4)
    crops = masks.crop_and_resize(proposals[[2, 2, 0]], (14, 14), np.array([2, 2, 0])).masks
    alone = masks[2].crop_and_resize(proposals[2:3], (14, 14), np.array([0])).masks
    assert np.array_equal(crops[0], alone[0])
    assert np.array_equal(crops[1], alone[0])


def test_whole_image_masks_are_the_bitmaps():
    polygons, masks, _ = _shapes(20)
    assert _mean_iou(masks.to_ndarray(), _bitmaps(polygons).astype(bool)) > 0.95
    assert masks.to_tensor(torch.float32, "cpu").shape == (20, SIDE, SIDE)
    areas = [cv2.contourArea(p.astype(np.float32)) for p in polygons]
    np.testing.assert_allclose(masks.areas, areas, rtol=0.01)


@pytest.mark.parametrize("index", [torch.tensor([3, 1]), np.array([3, 1]), [3, 1]])
def test_indexing_keeps_masks_with_their_boxes(index):
    _, masks, _ = _shapes(4)
    picked = masks[index]
    assert len(picked) == 2
    assert torch.equal(picked.masks_NSS, masks.masks_NSS[[3, 1]])
    assert torch.equal(picked.boxes_xyxy_px, masks.boxes_xyxy_px[[3, 1]])
    assert len(masks[torch.tensor([True, False, False, True])]) == 2
    assert len(masks[1]) == 1
    assert len(masks[1:]) == 3


def test_mmengine_slices_and_joins_them():
    _, masks, _ = _shapes(4)
    instances = InstanceData(masks=masks, labels=torch.arange(4))
    assert len(instances[torch.tensor([0, 2])].masks) == 2
    assert len(InstanceData.cat([instances, instances]).masks) == 8


def test_no_masks_and_flat_boxes():
    empty = MiniMasks(torch.zeros(0, 112, 112, dtype=torch.uint8), torch.zeros(0, 4), 8, 9)
    assert empty.crop_and_resize(np.zeros((0, 4), np.float32), (28, 28), np.zeros(0, int)).masks.shape == (0, 28, 28)
    assert empty.to_ndarray().shape == (0, 8, 9)
    flat = MiniMasks(torch.full((1, 112, 112), 255, dtype=torch.uint8), torch.tensor([[3.0, 3, 3, 7]]), 8, 9)
    crop = flat.crop_and_resize(np.array([[0, 0, 8, 8]], np.float32), (28, 28), np.array([0]), binarize=False)
    assert np.isfinite(crop.masks).all()


def test_geometry_is_refused_and_copies_are_shared():
    _, masks, _ = _shapes(2)
    with pytest.raises(KernelError, match="augmented them already"):
        masks.flip("horizontal")
    assert copy.deepcopy(masks) is masks
