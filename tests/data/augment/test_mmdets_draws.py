"""What is drawn, against mmdet's own transforms: the same distribution, or the same values for the same draws."""

import importlib

import numpy as np
import pytest
from scipy.stats import chisquare, ks_2samp

from piip_scale.config.detection import AugmentConfig, CropFirstConfig, PhotometricConfig
from piip_scale.data.augment.photometric import Colours, drawn_colours, recoloured
from piip_scale.data.augment.transforms import training_geometry

COUNT = 1500
CONFIGS = {
    "multi-scale": AugmentConfig(short_edge_px=(48, 56, 64, 72, 80), max_edge_px=133),
    "jitter": AugmentConfig(jitter_scale=(0.1, 2.0), crop_px=(102, 102)),
    "jitter of flat crops": AugmentConfig(jitter_scale=(0.8, 1.5), crop_px=(76, 153)),
    "DETR's": AugmentConfig(
        short_edge_px=(48, 64, 80),
        max_edge_px=133,
        crop_first=CropFirstConfig(short_edge_px=(40, 50, 60), crop_range_px=(38, 60)),
        crop_px=(102, 102),
    ),
}


@pytest.fixture(scope="module")
def mmdets():
    """Its transforms by name."""
    importlib.import_module("piip_scale.tasks.mmlab")  # completes mmcv, which mmdet needs
    import mmcv.transforms as general
    from mmdet.datasets import transforms
    from mmengine.registry import DefaultScope

    with DefaultScope.overwrite_default_scope("mmdet"):
        yield lambda name, **keys: getattr(transforms, name, None) or getattr(general, name)


def resize_to(mmdets, augment, sizes_px):
    scales = [(augment.max_edge_px, size) for size in sizes_px]
    return mmdets("RandomChoiceResize")(scales=scales, resize_type=mmdets("Resize"), keep_ratio=True)


def crop(mmdets, size, kind):
    return mmdets("RandomCrop")(size, crop_type=kind, allow_negative_crop=True)


def steps_of(mmdets, augment):
    """As mmdet's recipes write them."""
    steps = [mmdets("RandomFlip")(prob=augment.flip_probability)]
    if augment.jitter_scale is not None:
        # Width and height, in mmdet's order of these two.
        scale = augment.crop_px[::-1]
        resize = mmdets("RandomResize")(
            scale=scale, ratio_range=augment.jitter_scale, resize_type=mmdets("Resize"), keep_ratio=True
        )
        return [*steps, resize, crop(mmdets, scale, "absolute")]
    ways = [[resize_to(mmdets, augment, augment.short_edge_px)]]
    if (first := augment.crop_first) is not None:
        cropped = [
            resize_to(mmdets, augment, first.short_edge_px),
            crop(mmdets, first.crop_range_px, "absolute_range"),
            resize_to(mmdets, augment, augment.short_edge_px),
        ]
        ways.append(cropped)
    steps.append(mmdets("RandomChoice")(transforms=ways))
    return steps if augment.crop_px is None else [*steps, crop(mmdets, augment.crop_px, "absolute_range")]


def their_windows(steps, size_px):
    """Sides of the window and of the result, and whether it is mirrored, (COUNT, 7)."""
    drawn = []
    for _ in range(COUNT):
        results = {"img": np.zeros((*size_px, 3), np.uint8), "img_shape": size_px}
        for step in steps:
            results = step(results)
        height, width = results["img_shape"]
        corners = np.linalg.inv(results["homography_matrix"]) @ [[0, width], [0, height], [1, 1]]
        drawn.append([*np.sort(corners[0]), *np.sort(corners[1]), height, width, results["flip"]])
    return np.array(drawn)


def our_windows(augment, size_px):
    rng, drawn = np.random.default_rng(0), []
    for _ in range(COUNT):
        geometry = training_geometry(size_px, augment, rng)
        window = geometry.window
        drawn.append([window.left, window.right, window.top, window.bottom, *geometry.size_px, geometry.flip])
    return np.array(drawn)


@pytest.mark.parametrize("name", CONFIGS)
def test_windows_are_distributed_as_mmdets(mmdets, name):
    size_px, augment = (64, 121), CONFIGS[name]
    np.random.seed(0)
    theirs, ours = their_windows(steps_of(mmdets, augment), size_px), our_windows(augment, size_px)
    # The window is rounded to whole pixels; where it is small, that is a large share of it.
    assert np.abs(np.sort(ours[:, :4], axis=0) - np.sort(theirs[:, :4], axis=0)).mean() < 1.5
    theirs = np.rint(theirs)
    for mine, reference in zip(ours.T, theirs.T, strict=True):
        assert ks_2samp(mine, reference).pvalue > 1e-3
    # Not each for itself alone: width and place belong together.
    extents = [values[:, 4] * values[:, 5] * (1 + values[:, 6]) + values[:, 0] for values in (ours, theirs)]
    assert ks_2samp(*extents).pvalue > 1e-3


def their_recoloured(mmdets, pixels, flags):
    """What mmdet makes of an RGB image with its random numbers given, rounded and bounded at the end."""
    transform = mmdets("PhotoMetricDistortion")()
    transform._random_flags = lambda: flags
    found = transform({"img": pixels[..., ::-1]})["img"][..., ::-1]
    return np.clip(np.rint(found), 0, 255)


@pytest.mark.parametrize("seed", range(24))
def test_colours_are_mmdets_for_the_same_draws(mmdets, seed):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (40, 50, 3), np.uint8)
    mode, *flags = rng.integers(2, size=6).tolist()
    values = [rng.uniform(-32, 32), rng.uniform(0.5, 1.5), rng.uniform(0.5, 1.5), rng.uniform(-18, 18)]
    order = rng.permutation(3)
    brighter, contrasted, saturated, turned, swapped = flags
    colours = Colours(
        brightness=values[0] if brighter else 0.0,
        contrast_first=values[1] if contrasted and mode else 1.0,
        saturation=values[2] if saturated else None,
        hue_degrees=values[3] if turned else None,
        contrast_last=values[1] if contrasted and not mode else 1.0,
        # mmdet's channels count from blue.
        channels=tuple(2 - order[::-1]) if swapped else (0, 1, 2),
    )
    theirs = their_recoloured(mmdets, pixels, (mode, *flags, *values, order))
    different = np.abs(recoloured(pixels, colours) - theirs)
    assert different.max() <= 1
    assert (different > 0).mean() < 0.01


def test_colours_are_drawn_as_mmdet_does(mmdets):
    config, rng = PhotometricConfig(), np.random.default_rng(1)
    ours = [drawn_colours(config, rng) for _ in range(COUNT)]
    np.random.seed(1)
    transform = mmdets("PhotoMetricDistortion")()
    theirs = [transform._random_flags.__wrapped__(transform) for _ in range(COUNT)]

    def told(flags):
        mode, brighter, contrasted, saturated, turned, swapped, delta, alpha, saturation, hue, order = flags
        first, last = (alpha if contrasted and mode == way else 1.0 for way in (1, 0))
        place = int(order @ [9, 3, 1]) if swapped else 0 * 9 + 1 * 3 + 2
        return [delta * brighter, first, saturation if saturated else 0, hue * turned, last, place]

    numbers = [[c.brightness, c.contrast_first, c.saturation or 0, c.hue_degrees or 0, c.contrast_last] for c in ours]
    mine = np.c_[numbers, [np.array(c.channels) @ [9, 3, 1] for c in ours]]
    reference = np.array([told(flags) for flags in theirs])
    for one, other in zip(mine.T, reference.T, strict=True):
        assert ks_2samp(one, other).pvalue > 1e-3
    kinds = np.array([[c.brightness != 0, c.saturation is not None, c.hue_degrees is not None] for c in ours])
    assert chisquare(np.bincount(kinds @ [4, 2, 1], minlength=8)).pvalue > 1e-3


def test_grey_stays_grey_and_nothing_wraps():
    grey = np.full((4, 5, 3), 250, np.uint8)
    bright = recoloured(grey, Colours(32.0, 1.5, 1.5, 18.0, 1.0, (2, 0, 1)))
    assert (bright == 255).all()
    dark = recoloured(np.zeros_like(grey), Colours(-32.0, 1.0, None, 10.0, 1.5, (0, 1, 2)))
    assert (dark == 0).all()
