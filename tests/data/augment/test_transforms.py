"""Geometry of images, boxes and masks against plain, slow twins."""

import cv2
import mmcv
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_sets import make_coco
from pycocotools import mask as coco_mask

from piip_scale.config.detection import AugmentConfig, CropFirstConfig
from piip_scale.data.augment.canvas import blank_canvas
from piip_scale.data.augment.geometry import Geometry, Window
from piip_scale.data.augment.masks import clip_polygon
from piip_scale.data.augment.transforms import apply_geometry, evaluation_geometry, training_geometry
from piip_scale.data.batch import MASK_SIZE_PX
from piip_scale.data.packing.pack import pack_coco
from piip_scale.data.reading.decoding import Sample
from piip_scale.data.reading.shards import ShardSet
from piip_scale.data.samples.detection import DetectionSamples
from piip_scale.errors import DataError

GEOMETRIES = {
    "whole": Geometry(Window(0, 0, 90, 70), (70, 90)),
    "smaller": Geometry(Window(0, 0, 90, 70), (31, 40)),
    "larger, mirrored": Geometry(Window(0, 0, 90, 70), (210, 270), flip=True),
    "cut": Geometry(Window(20, 15, 60, 50), (70, 100)),
    "cut, mirrored": Geometry(Window(33, 0, 90, 41), (50, 57), flip=True),
}


def plain_matrix(geometry: Geometry) -> np.ndarray:
    """From stored to new coordinates, as a product of elementary maps."""
    window, (height, width) = geometry.window, geometry.size_px
    shift = np.array([[1, 0, -window.left], [0, 1, -window.top], [0, 0, 1.0]])
    scale = np.diag([width / (window.right - window.left), height / (window.bottom - window.top), 1.0])
    mirror = np.array([[-1, 0, width], [0, 1, 0], [0, 0, 1.0]]) if geometry.flip else np.eye(3)
    return mirror @ scale @ shift


def is_inside(points: np.ndarray, polygon: np.ndarray) -> np.ndarray:
    """Even-odd rule for points (N, 2), edge by edge."""
    inside = np.zeros(len(points), bool)
    for (x0, y0), (x1, y1) in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
        spans = (points[:, 1] >= min(y0, y1)) & (points[:, 1] < max(y0, y1))
        if y0 != y1:
            inside ^= spans & (points[:, 0] < x0 + (points[:, 1] - y0) * (x1 - x0) / (y1 - y0))
    return inside


def plain_mask(box, covers, geometry: Geometry, samples: int = 4) -> np.ndarray:
    """Coverage of each mini-mask pixel: the share of its sample points that ``covers`` in the stored image."""
    side = MASK_SIZE_PX * samples
    u, v = np.meshgrid((np.arange(side) + 0.5) / side, (np.arange(side) + 0.5) / side)
    new = np.stack([box[0] + u * (box[2] - box[0]), box[1] + v * (box[3] - box[1]), np.ones_like(u)])
    stored = np.linalg.inv(plain_matrix(geometry)) @ new.reshape(3, -1)
    return covers(stored[:2].T).reshape(MASK_SIZE_PX, samples, MASK_SIZE_PX, samples).mean(axis=(1, 3))


def blob(rng, centre, radius, corners=12) -> np.ndarray:
    angles = np.sort(rng.random(corners)) * 2 * np.pi
    reach = rng.uniform(0.6, 1.0, corners) * radius
    return np.stack([centre[0] + reach * np.cos(angles), centre[1] + reach * np.sin(angles)], axis=1)


def sample_of(segmentations, boxes) -> Sample:
    pixels = np.random.default_rng(1).integers(0, 255, (70, 90, 3), np.uint8)
    count = len(boxes)
    boxes = np.array(boxes, float).reshape(-1, 4)
    return Sample("k", 1, pixels, boxes, np.arange(count), np.zeros(count, bool), segmentations)


def bounds(polygon) -> list[float]:
    return [*polygon.min(axis=0), *polygon.max(axis=0)]


def iou_at_28(first: np.ndarray, second: np.ndarray) -> float:
    a, b = (mask.reshape(28, 4, 28, 4).mean(axis=(1, 3)) >= 0.5 for mask in (first, second))
    return (a & b).sum() / (a | b).sum()


@pytest.mark.parametrize("name", GEOMETRIES)
def test_image_is_sampled_bilinearly_where_the_map_says(name):
    geometry = GEOMETRIES[name]
    pixels = sample_of(None, []).pixels.astype(float)
    window, (height, width) = geometry.window, geometry.size_px
    rows, columns = np.mgrid[:height, :width]
    new = np.stack([columns.ravel() + 0.5, rows.ravel() + 0.5, np.ones(rows.size)])
    x, y, _ = np.linalg.inv(plain_matrix(geometry)) @ new - 0.5
    x = np.clip(x, window.left, window.right - 1)
    y = np.clip(y, window.top, window.bottom - 1)
    x0, y0 = np.floor(x).astype(int), np.floor(y).astype(int)
    x1, y1 = np.minimum(x0 + 1, window.right - 1), np.minimum(y0 + 1, window.bottom - 1)
    fx, fy = (x - x0)[:, None], (y - y0)[:, None]
    top = pixels[y0, x0] * (1 - fx) + pixels[y0, x1] * fx
    expected = top * (1 - fy) + (pixels[y1, x0] * (1 - fx) + pixels[y1, x1] * fx) * fy
    found = geometry.image(pixels.astype(np.uint8))
    assert found.shape == (height, width, 3)
    assert np.abs(found.reshape(-1, 3) - expected).max() <= 1.5


@pytest.mark.parametrize("name", GEOMETRIES)
def test_boxes_and_points_follow_the_map_and_back(name):
    geometry = GEOMETRIES[name]
    rng = np.random.default_rng(0)
    corners = rng.uniform((0, 0), (90, 70), (40, 2, 2))
    boxes = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)
    found = geometry.boxes(boxes)
    height, width = geometry.size_px
    for box, new in zip(boxes, found, strict=True):
        ends = [plain_matrix(geometry) @ (x, y, 1) for x in box[::2] for y in box[1::2]]
        xs, ys = (np.clip([end[axis] for end in ends], 0, limit) for axis, limit in ((0, width), (1, height)))
        assert new == pytest.approx([min(xs), min(ys), max(xs), max(ys)], abs=1e-9)
    points = boxes[:, :2]
    assert geometry.stored_points(geometry.points(points)) == pytest.approx(points, abs=1e-9)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_polygon_masks_are_the_coverage_of_their_box(name):
    geometry, rng = GEOMETRIES[name], np.random.default_rng(3)
    for _ in range(8):
        polygons = [blob(rng, (40, 32), 24), blob(rng, (50, 36), 14)]
        lists = [polygon.ravel().tolist() for polygon in polygons]
        target = apply_geometry(sample_of((lists,), [bounds(np.concatenate(polygons))]), geometry)
        truth = plain_mask(
            target.boxes_xyxy_px[0], lambda p, each=polygons: np.any([is_inside(p, q) for q in each], axis=0), geometry
        )
        found = target.mini_masks[0] / 255
        assert np.abs(found - truth).mean() < 0.012
        assert abs((found - truth).mean()) < 0.004
        assert iou_at_28(found, truth) > 0.97


@pytest.mark.parametrize("name", GEOMETRIES)
def test_run_length_masks_are_the_coverage_of_their_box(name):
    geometry, rng = GEOMETRIES[name], np.random.default_rng(4)
    for _ in range(8):
        bitmap = np.zeros((70, 90), np.uint8)
        cv2.fillPoly(bitmap, [blob(rng, (44, 33), 22).astype(np.int32)], 1)
        packed = coco_mask.encode(np.asfortranarray(bitmap))
        x, y, w, h = coco_mask.toBbox(packed)
        target = apply_geometry(sample_of((packed,), [[x, y, x + w, y + h]]), geometry)

        def covers(points, bitmap=bitmap):
            columns, rows = np.clip(np.floor(points).astype(int), 0, (89, 69)).T
            return bitmap[rows, columns].astype(bool)

        truth = plain_mask(target.boxes_xyxy_px[0], covers, geometry)
        found = target.mini_masks[0] / 255
        # Interpolation softens the steps of a bitmap's border; the area stays.
        assert np.abs(found - truth).mean() < 0.035
        assert abs((found - truth).mean()) < 0.01
        assert iou_at_28(found, truth) > 0.95


@pytest.mark.parametrize("kind", ["polygon", "run lengths"])
@pytest.mark.parametrize("name", ["cut", "cut, mirrored"])
def test_box_of_a_cut_object_is_that_of_what_remains(name, kind):
    geometry, rng = GEOMETRIES[name], np.random.default_rng(5)
    window = geometry.window
    fine = np.stack(np.meshgrid(np.arange(0, 90, 0.25) + 0.125, np.arange(0, 70, 0.25) + 0.125), axis=-1)
    in_window = (fine >= (window.left, window.top)).all(-1) & (fine < (window.right, window.bottom)).all(-1)
    for _ in range(10):
        polygon = blob(rng, rng.uniform((10, 10), (80, 60)), 20)
        segmentation = [polygon.ravel().tolist()]
        inside = is_inside(fine.reshape(-1, 2), polygon).reshape(fine.shape[:2])
        if kind == "run lengths":
            bitmap = np.zeros((70, 90), np.uint8)
            cv2.fillPoly(bitmap, [polygon.astype(np.int32)], 1)
            segmentation, inside = coco_mask.encode(np.asfortranarray(bitmap)), bitmap.repeat(4, 0).repeat(4, 1) > 0
        every = fine[inside]
        box = [*(every.min(axis=0) - 0.125), *(every.max(axis=0) + 0.125)]
        target = apply_geometry(sample_of((segmentation,), [box]), geometry)
        rest = fine[inside & in_window]
        if not len(rest):
            assert len(target.labels) == 0
            continue
        ends = np.array([rest.min(axis=0) - 0.125, rest.max(axis=0) + 0.125])
        new = (plain_matrix(geometry) @ np.c_[ends, [1, 1]].T)[:2]
        # A thin tip may pass between the sample points.
        expected = [*new.min(axis=1), *new.max(axis=1)]
        assert target.boxes_xyxy_px[0] == pytest.approx(expected, abs=0.5 * max(geometry.scale_xy))


@given(st.integers(0, 10_000))
def test_clipped_polygon_covers_what_both_cover(seed):
    rng = np.random.default_rng(seed)
    polygon, window = blob(rng, rng.uniform(10, 50, 2), 25, corners=7), Window(20, 18, 44, 40)
    clipped = clip_polygon(polygon, window)
    points = rng.uniform(0, 64, (500, 2))
    in_window = ((points > (20, 18)) & (points < (44, 40))).all(axis=1)
    expected = is_inside(points, polygon) & in_window
    found = is_inside(points, clipped) if len(clipped) else np.zeros(500, bool)
    assert np.array_equal(found, expected)


def test_objects_without_rest_are_left_out_and_the_others_keep_their_labels():
    geometry = Geometry(Window(40, 30, 90, 70), (40, 50))
    boxes = [[0, 0, 39, 29], [45, 35, 60, 60], [0, 0, 90, 70], [40, 10, 50, 30]]
    plain = apply_geometry(sample_of(None, boxes), geometry)
    assert plain.labels.tolist() == [1, 2]
    assert plain.mini_masks is None
    corner = [[0, 0, 30, 0, 0, 25]]
    masks = (corner, [[45, 35, 60, 35, 60, 60, 45, 60]], corner, corner)
    with_masks = apply_geometry(sample_of(masks, boxes), geometry)
    assert with_masks.labels.tolist() == [1]
    assert with_masks.mini_masks.mean() > 252
    empty = apply_geometry(sample_of((), []), geometry)
    assert empty.mini_masks.shape == (0, MASK_SIZE_PX, MASK_SIZE_PX)
    assert empty.boxes_xyxy_px.shape == (0, 4)


def test_damaged_run_lengths_are_an_error():
    with pytest.raises(DataError, match="run lengths"):
        apply_geometry(sample_of(({"size": [70, 90], "counts": "oooooo"},), [[0, 0, 9, 9]]), GEOMETRIES["whole"])


@given(st.integers(5, 3000), st.integers(5, 3000), st.integers(0, 1000))
def test_sizes_are_mmcvs(height, width, seed):
    augment = AugmentConfig(short_edge_px=(480, 512, 800), max_edge_px=1333)
    sizes = [mmcv.rescale_size((width, height), (1333, short))[::-1] for short in augment.short_edge_px]
    if min(map(min, sizes)) < 1:
        return
    assert evaluation_geometry((height, width), augment).size_px == sizes[-1]
    drawn = training_geometry((height, width), augment, np.random.default_rng(seed))
    assert drawn.size_px in sizes
    assert drawn.window == Window(0, 0, width, height)


@given(st.integers(20, 2000), st.integers(20, 2000), st.floats(0.1, 2.0), st.integers(0, 1000))
def test_jitter_cuts_a_window_of_the_resized_image(height, width, ratio, seed):
    augment = AugmentConfig(jitter_scale=(ratio, ratio), crop_px=(256, 320))
    geometry = training_geometry((height, width), augment, np.random.default_rng(seed))
    whole = mmcv.rescale_size((width, height), (int(320 * ratio), int(256 * ratio)))[::-1]
    assert geometry.size_px == (max(1, min(whole[0], 256)), max(1, min(whole[1], 320)))
    window = geometry.window
    assert 0 <= window.left < window.right <= width
    assert 0 <= window.top < window.bottom <= height
    if min(whole) >= 1:
        extent = window.bottom - window.top, window.right - window.left
        for have, want, stored, full in zip(extent, geometry.size_px, (height, width), whole, strict=True):
            assert abs(have - want * stored / full) <= 1.0


def test_jitter_offsets_and_flips_are_uniform():
    augment = AugmentConfig(jitter_scale=(2.0, 2.0), crop_px=(100, 100))
    rng = np.random.default_rng(0)
    drawn = [training_geometry((100, 100), augment, rng) for _ in range(4000)]
    lefts = np.array([geometry.window.left for geometry in drawn])
    assert (lefts.min(), lefts.max()) == (0, 50)
    assert abs(lefts.mean() - 25) < 5 * 14.6 / np.sqrt(4000)
    assert abs(np.mean([geometry.flip for geometry in drawn]) - 0.5) < 5 * 0.5 / np.sqrt(4000)
    never = AugmentConfig(flip_probability=0.0)
    assert not any(training_geometry((9, 9), never, rng).flip for _ in range(50))


DETR = AugmentConfig(
    short_edge_px=(48, 64, 80),
    max_edge_px=133,
    crop_first=CropFirstConfig(short_edge_px=(40, 50, 60), crop_range_px=(38, 60)),
    crop_px=(102, 102),
)


def plain_detr(size_px, augment: AugmentConfig, rng) -> tuple[np.ndarray, tuple[int, int]]:
    """DETR's two ways one step after the other, as a product of elementary maps, and the size they lead to."""
    matrix, size = np.eye(3), size_px

    def resize(short_edge_px):
        nonlocal matrix, size
        new = mmcv.rescale_size(size[::-1], (augment.max_edge_px, short_edge_px))[::-1]
        matrix, size = np.diag([new[1] / size[1], new[0] / size[0], 1.0]) @ matrix, new

    def crop(height, width):
        nonlocal matrix, size
        height, width = min(height, size[0]), min(width, size[1])
        top, left = rng.integers(0, size[0] - height + 1), rng.integers(0, size[1] - width + 1)
        matrix, size = np.array([[1, 0, -left], [0, 1, -top], [0, 0, 1.0]]) @ matrix, (height, width)

    first = augment.crop_first
    if rng.random() < first.probability:
        resize(first.short_edge_px[rng.integers(0, len(first.short_edge_px))])
        low, high = first.crop_range_px
        height = rng.integers(min(size[0], low), min(size[0], high) + 1)
        width = rng.integers(min(size[1], low), min(size[1], high) + 1)
        crop(height, width)
    resize(augment.short_edge_px[rng.integers(0, len(augment.short_edge_px))])
    crop(*augment.crop_px)
    return matrix, size


@given(st.integers(30, 1500), st.integers(30, 1500), st.integers(0, 1000))
def test_two_resizes_and_two_crops_are_one_window_of_the_stored_image(height, width, seed):
    geometry = training_geometry((height, width), DETR, np.random.default_rng(seed))
    matrix, size = plain_detr((height, width), DETR, np.random.default_rng(seed))
    assert geometry.size_px == size
    window = geometry.window
    assert 0 <= window.left < window.right <= width
    assert 0 <= window.top < window.bottom <= height
    corners = np.linalg.inv(matrix) @ [[0, size[1]], [0, size[0]], [1, 1]]
    # Half a pixel by rounding; a window of less than a pixel is widened to a whole one.
    found = np.array([[window.left, window.right], [window.top, window.bottom]])
    assert np.abs(found - corners[:2]).max() <= 1.0
    large = (corners[:2, 1] - corners[:2, 0]) >= 1
    assert np.abs(found - corners[:2])[large].max(initial=0) <= 0.5 + 1e-9


def test_without_recomputing_a_cut_box_is_cut_itself():
    geometry = GEOMETRIES["cut, mirrored"]
    triangle = np.array([[20.0, 20.0], [60.0, 60.0], [20.0, 60.0]])
    stored = sample_of(([triangle.ravel().tolist()],), [bounds(triangle)])
    cut = apply_geometry(stored, geometry, recompute_boxes=False)
    assert cut.boxes_xyxy_px == pytest.approx(geometry.boxes(stored.boxes_xyxy_px))
    truth = plain_mask(cut.boxes_xyxy_px[0], lambda points: is_inside(points, triangle), geometry)
    assert np.abs(cut.mini_masks[0] / 255 - truth).mean() < 0.012
    assert (apply_geometry(stored, geometry).boxes_xyxy_px != cut.boxes_xyxy_px).any()


def test_an_image_is_drawn_into_its_place_and_nowhere_else():
    sizes = [(70, 90), (31, 40)]
    canvas, places = blank_canvas(sizes, 64)
    assert canvas.shape == (2, 128, 128, 3)
    pixels = sample_of(None, []).pixels
    for geometry, place in zip((GEOMETRIES["whole"], GEOMETRIES["smaller"]), places, strict=True):
        geometry.draw(pixels, place)
        assert np.array_equal(place, geometry.image(pixels))
    for image, (height, width) in zip(canvas.numpy(), sizes, strict=True):
        assert not image[height:].any()
        assert not image[:, width:].any()


def outlines_of(polygons) -> list[list[np.ndarray]]:
    return [[outline.numpy() for outline in outlines] for outlines in polygons.per_object()]


@pytest.mark.parametrize("name", GEOMETRIES)
def test_outlines_show_what_the_stored_polygons_do(name):
    geometry, rng = GEOMETRIES[name], np.random.default_rng(6)
    height, width = geometry.size_px
    objects = [[blob(rng, (40, 32), 24), blob(rng, (70, 50), 14)], [blob(rng, (30, 30), 18)], [blob(rng, (2, 2), 3)]]
    lists = tuple([polygon.ravel().tolist() for polygon in polygons] for polygons in objects)
    boxes = [bounds(np.concatenate(polygons)) for polygons in objects]
    target = apply_geometry(sample_of(lists, boxes), geometry, polygons=True)
    assert len(target.polygons) == len(target.labels) >= 2
    points = rng.uniform((0, 0), (width, height), (3000, 2))
    stored = (np.linalg.inv(plain_matrix(geometry)) @ np.c_[points, np.ones(3000)].T)[:2].T
    for label, outlines in zip(target.labels, target.polygons, strict=True):
        assert all((o >= -1e-9).all() and (o <= np.array([width, height]) + 1e-9).all() for o in outlines)
        found = np.any([is_inside(points, outline) for outline in outlines], axis=0)
        truth = np.any([is_inside(stored, polygon) for polygon in objects[label]], axis=0)
        assert (found != truth).mean() < 0.002


def test_run_lengths_are_traced():
    geometry = GEOMETRIES["cut, mirrored"]
    bitmap = np.zeros((70, 90), np.uint8)
    bitmap[10:30, 40:80], bitmap[50:52, 20:60] = 1, 1
    packed = coco_mask.encode(np.asfortranarray(bitmap))
    target = apply_geometry(sample_of((packed,), [[20, 10, 80, 52]]), geometry, polygons=True)
    rows, columns = np.mgrid[: geometry.size_px[0], : geometry.size_px[1]]
    centres = np.stack([columns.ravel() + 0.5, rows.ravel() + 0.5], axis=1)
    found = np.any([is_inside(centres, outline) for outline in target.polygons[0]], axis=0)
    x, y = (np.linalg.inv(plain_matrix(geometry)) @ np.c_[centres, np.ones(len(centres))].T)[:2]
    truth = bitmap[np.floor(y).astype(int), np.floor(x).astype(int)].astype(bool)
    assert (found & truth).sum() / (found | truth).sum() > 0.93


def test_outlines_come_in_the_batch_with_their_objects(tmp_path):
    pack_coco(*make_coco(tmp_path, 8), tmp_path / "out")
    shards = ShardSet.open(tmp_path / "out")
    maker = DetectionSamples(shards, AugmentConfig(short_edge_px=(60,), flip_probability=0.0), polygons=True)
    samples = [maker.sample(shards.read(number), np.random.default_rng(0)) for number in range(8)]
    batch = maker.collate(samples, training=True).batch()
    assert [len(instances.labels) for instances in batch.instances] == [0, 1, 2, 3, 0, 1, 2, 3]
    for instances, sample in zip(batch.to("cpu").instances, samples, strict=True):
        assert len(instances.polygons) == len(instances.labels)
        for outlines, expected in zip(outlines_of(instances.polygons), sample.target.polygons, strict=True):
            assert all(np.allclose(one, other, atol=1e-4) for one, other in zip(outlines, expected, strict=True))
    plain = DetectionSamples(shards, AugmentConfig(short_edge_px=(60,)))
    batch = plain.collate([plain.sample(shards.read(1), None)], training=False).batch()
    assert batch.instances[0].polygons is None
