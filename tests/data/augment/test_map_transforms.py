"""Augmentation of label maps draws and computes what mmsegmentation's transforms do."""

import numpy as np
import pytest

from piip_scale.config.segmentation import SegmentationAugment
from piip_scale.data.augment.canvas import label_canvas_of
from piip_scale.data.augment.map_transforms import augmented, resized, resized_labels, resized_px
from piip_scale.data.reading.label_maps import IGNORED
from piip_scale.tasks import mmcv_ext


@pytest.fixture
def numpys_draws(monkeypatch):
    """Lets numpy's global functions, which mmseg draws by, draw from a generator of ours."""

    def replace(rng):
        monkeypatch.setattr(np.random, "random_sample", rng.random)
        monkeypatch.setattr(np.random, "uniform", rng.uniform)
        monkeypatch.setattr(np.random, "randint", lambda low, high=None: int(rng.integers(low, high)))
        monkeypatch.setattr(np.random, "choice", lambda options, p: options[0 if rng.random() < p[0] else 1])

    return replace


def sample(height, width, seed, num_classes=4, cell=24):
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    waves = [127 + 120 * np.sin(rows / (7 + c) + columns * (seed + 1) / width) for c in range(3)]
    blocks = rng.integers(0, num_classes, (-(-height // cell), -(-width // cell)), dtype=np.uint8)
    labels = np.kron(blocks, np.ones((cell, cell), np.uint8))[:height, :width]
    labels[:5] = IGNORED
    return np.stack(waves, -1).astype(np.uint8), labels


def theirs(pixels, labels, augment):
    mmcv_ext.install()
    from mmcv.transforms import Compose, RandomFlip  # not before the stand-in for mmcv's compiled ops
    from mmcv.transforms import RandomResize as Resize
    from mmseg.datasets.transforms import PhotoMetricDistortion, RandomCrop

    steps = [
        Resize((augment.max_edge_px, augment.short_edge_px), ratio_range=augment.scale_range, keep_ratio=True),
        RandomCrop(augment.crop_px, augment.max_class_share),
        RandomFlip(prob=augment.flip_probability),
        PhotoMetricDistortion(),
    ]
    told = {"img": pixels[..., ::-1], "gt_seg_map": labels, "seg_fields": ["gt_seg_map"], "img_shape": labels.shape}
    found = Compose(steps)(told)
    return found["img"][..., ::-1], found["gt_seg_map"]


@pytest.mark.parametrize("seed", range(24))
def test_augmentation_is_mmsegs_for_the_same_draws(seed, numpys_draws):
    pixels, labels = sample(60 + 7 * seed, 200 - 6 * seed, seed, cell=60 if seed % 2 else 24)
    augment = SegmentationAugment(short_edge_px=96, max_edge_px=240, crop_px=(96, 64), max_class_share=0.6)
    ours, our_labels, _ = augmented(pixels, labels, augment, np.random.default_rng(seed))
    numpys_draws(np.random.default_rng(seed))
    expected, expected_labels = theirs(pixels, labels, augment)
    np.testing.assert_array_equal(our_labels, expected_labels)
    np.testing.assert_array_equal(ours, expected)


def slowly(values, size_px, nearest):
    """Each pixel by itself: the one, or the mean of the four, that its centre falls on or between."""
    result = np.zeros((*size_px, *values.shape[2:]))
    for row in range(size_px[0]):
        for column in range(size_px[1]):
            y, x = (
                (place if nearest else place + 0.5) * have / want - (0 if nearest else 0.5)
                for place, have, want in zip((row, column), values.shape, size_px, strict=False)
            )
            if nearest:
                result[row, column] = values[int(y), int(x)]
                continue
            y, x = np.clip(y, 0, values.shape[0] - 1), np.clip(x, 0, values.shape[1] - 1)
            top, left = int(y), int(x)
            bottom, right = min(top + 1, values.shape[0] - 1), min(left + 1, values.shape[1] - 1)
            upper = values[top, left] * (1 - x + left) + values[top, right] * (x - left)
            lower = values[bottom, left] * (1 - x + left) + values[bottom, right] * (x - left)
            result[row, column] = upper * (1 - y + top) + lower * (y - top)
    return result


@pytest.mark.parametrize("size_px", [(23, 41), (64, 90)])
def test_resizing_is_the_slow_ones(size_px):
    pixels, labels = sample(37, 50, 1, cell=5)
    np.testing.assert_array_equal(resized_labels(labels, size_px), slowly(labels, size_px, nearest=True))
    assert np.abs(resized(pixels, size_px) - slowly(pixels.astype(float), size_px, nearest=False)).max() <= 1


def test_sizes_are_mmcvs():
    mmcv_ext.install()
    import mmcv

    rng = np.random.default_rng(0)
    for height, width, short_px in rng.integers(20, 900, (200, 3)).tolist():
        long_px = short_px * 4
        wanted, _ = mmcv.imrescale(np.zeros((height, width), np.uint8), (long_px, short_px), return_scale=True)
        assert resized_px((height, width), short_px, long_px) == wanted.shape


def test_a_crop_of_one_class_is_taken_only_after_ten_tries():
    augment = SegmentationAugment(short_edge_px=64, max_edge_px=64, crop_px=(32, 32), scale_range=(1.0, 1.0))
    labels = np.zeros((64, 64), np.uint8)
    labels[:6, :6] = 1
    pixels = np.zeros((64, 64, 3), np.uint8)

    def num_draws(share):
        drawn = []

        class Counting:
            def __getattr__(self, name):
                def draw(*arguments):
                    drawn.append(name)
                    return getattr(rng, name)(*arguments)

                return draw

        rng = np.random.default_rng(0)
        augmented(pixels, labels, augment.model_copy(update={"max_class_share": share, "distortion": None}), Counting())
        return drawn.count("integers")

    assert num_draws(1.0) == 2
    assert num_draws(0.75) == 2 + 10 * 2


def test_a_canvas_of_label_maps_ignores_its_rest():
    canvas = label_canvas_of([np.ones((3, 5), np.uint8), np.zeros((4, 2), np.uint8)], (6, 4))
    assert canvas.shape == (2, 6, 5)
    assert (canvas[0, :3, :5] == 1).all()
    assert (canvas[1, :4, :2] == 0).all()
    assert (canvas == IGNORED).sum() == 2 * 30 - 15 - 8
