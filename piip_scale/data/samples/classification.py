"""Classification's samples: from stored bytes to batches of square images and labels."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from piip_scale.config.classification import ImageAugmentConfig
from piip_scale.data.batch import ClassificationBatch, ImageInfo
from piip_scale.data.images import Image
from piip_scale.data.reading.decoding import decode_labelled
from piip_scale.data.reading.raw import RawSample
from piip_scale.data.reading.sample_set import SampleSet

_LARGEST_SEED = 2**63


@dataclass(frozen=True)
class AugmentedImage:
    """A sample as network input.

    Attributes:
        pixels_CHW: RGB, uint8 (3, S, S).
        label: Index of its class.
        info: Where it comes from.
        batch_seed: Its contribution to what a whole batch draws.
    """

    pixels_CHW: Image
    label: int
    info: ImageInfo
    batch_seed: int


@dataclass(frozen=True)
class PackedLabels:
    """A classification batch on its way from a worker; see ``ClassificationBatch``."""

    images_BHWC: Tensor
    labels: Tensor
    soft_labels_BK: Tensor | None
    infos: tuple[ImageInfo, ...]

    def pin_memory(self) -> PackedLabels:
        """A copy in page-locked memory."""
        soft = None if self.soft_labels_BK is None else self.soft_labels_BK.pin_memory()
        return replace(
            self, images_BHWC=self.images_BHWC.pin_memory(), labels=self.labels.pin_memory(), soft_labels_BK=soft
        )

    def batch(self) -> ClassificationBatch:
        """The batch."""
        return ClassificationBatch(self.images_BHWC, self.infos, self.labels, self.soft_labels_BK)


class ClassificationSamples:
    """Decodes, augments and batches labelled images: a ``SampleMaker``.

    Args:
        shards: The set, for its number of classes.
        augment: How an image becomes network input.
        size_px: Side of that input.
        label_smoothing: Of mixed labels.
    """

    def __init__(self, shards: SampleSet, augment: ImageAugmentConfig, size_px: int, label_smoothing: float) -> None:
        self._num_classes, self._size_px = len(shards.classes), size_px
        self._train, self._evaluate = training_transform(augment, size_px), evaluation_transform(augment, size_px)
        self._mix = _mixer(augment, self._num_classes, label_smoothing)

    def sample(self, raw: RawSample, rng: np.random.Generator | None) -> AugmentedImage:
        """A stored sample as network input; without chance where ``rng`` is ``None``.

        Raises:
            DataError: The image or its label cannot be read.
        """
        labelled = decode_labelled(raw, self._num_classes)
        height, width = labelled.pixels.shape[:2]
        side = self._size_px
        info = ImageInfo(labelled.key, labelled.image_id, (height, width), (side, side), (side / width, side / height))
        if rng is None:
            return AugmentedImage(self._evaluate(labelled.pixels), labelled.label, info, 0)
        with _seeded(rng):
            pixels_CHW = self._train(labelled.pixels)
        return AugmentedImage(pixels_CHW, labelled.label, info, int(rng.integers(_LARGEST_SEED)))

    def collate(self, samples: Sequence[AugmentedImage], *, training: bool) -> PackedLabels:
        """One tensor of images, one of labels; mixed in training where the config says so."""
        infos = tuple(sample.info for sample in samples)
        labels = torch.tensor([sample.label for sample in samples])
        if not training or self._mix is None:
            images = torch.from_numpy(np.stack([sample.pixels_CHW for sample in samples]))
            return PackedLabels(images.permute(0, 2, 3, 1), labels, None, infos)
        # A batch has no number of its own: its chance follows from its samples', whoever collates them.
        with _seeded(np.random.default_rng([sample.batch_seed for sample in samples])):
            images, soft_labels_BK = self._mix([(sample.pixels_CHW, sample.label) for sample in samples])
        return PackedLabels(images.permute(0, 2, 3, 1), labels, soft_labels_BK, infos)


def training_transform(augment: ImageAugmentConfig, size_px: int) -> Callable[[Image], Image]:
    """Timm's augmentation of one RGB image, uint8 (H, W, 3) to (3, S, S); draws from the global generators."""
    from timm.data.transforms_factory import transforms_imagenet_train

    transform = transforms_imagenet_train(
        size_px,
        scale=augment.crop_scale,
        ratio=augment.crop_ratio,
        hflip=augment.flip_probability,
        color_jitter=augment.color_jitter,
        auto_augment=augment.auto_augment,
        interpolation=augment.interpolation,
        mean=tuple(value / 255 for value in augment.mean),
        # It leaves normalising to the device, and with it erasing, whose noise is in normalised values.
        use_prefetcher=True,
    )
    return _Transform(transform, _eraser(augment))


def evaluation_transform(augment: ImageAugmentConfig, size_px: int) -> Callable[[Image], Image]:
    """The centre of one resized RGB image, uint8 (H, W, 3) to (3, S, S)."""
    from timm.data.transforms_factory import transforms_imagenet_eval

    interpolation = "bicubic" if augment.interpolation == "random" else augment.interpolation
    transform = transforms_imagenet_eval(
        size_px, crop_pct=augment.eval_crop_share, interpolation=interpolation, use_prefetcher=True
    )
    return _Transform(transform)


class _Transform:
    """Timm's transform of Pillow images, for arrays."""

    def __init__(self, transform: Callable[[Any], Tensor], erase: Callable[[Tensor], Tensor] | None = None) -> None:
        self._transform, self._erase = transform, erase

    def __call__(self, pixels: Image) -> Image:
        import PIL.Image

        image_CHW = self._transform(PIL.Image.fromarray(pixels))
        return np.asarray(image_CHW if self._erase is None else self._erase(image_CHW))


class _Eraser:
    """Timm's random erasing of an image that is not normalised yet; noise beyond black and white is clipped."""

    def __init__(self, augment: ImageAugmentConfig) -> None:
        from timm.data.random_erasing import RandomErasing

        self._erase = RandomErasing(augment.erase_probability, mode="pixel", device="cpu")
        self._mean_C11, self._std_C11 = (torch.tensor(v).view(3, 1, 1) for v in (augment.mean, augment.std))

    def __call__(self, image_CHW: Tensor) -> Tensor:
        normalised = self._erase((image_CHW - self._mean_C11) / self._std_C11)
        pixels_CHW: Tensor = (normalised * self._std_C11 + self._mean_C11).round().clamp(0, 255).byte()
        return pixels_CHW


def _eraser(augment: ImageAugmentConfig) -> _Eraser | None:
    return _Eraser(augment) if augment.erase_probability else None


def _mixer(
    augment: ImageAugmentConfig, num_classes: int, label_smoothing: float
) -> Callable[[list[tuple[Image, int]]], tuple[Tensor, Tensor]] | None:
    """Timm's mixing of a list of images (3, S, S) and labels: images uint8 (B, 3, S, S), soft labels (B, K)."""
    from timm.data.mixup import FastCollateMixup

    if (mix := augment.mix) is None:
        return None
    return FastCollateMixup(  # type: ignore[no-any-return]  # timm names no types
        mixup_alpha=mix.mixup_alpha,
        cutmix_alpha=mix.cutmix_alpha,
        prob=mix.probability,
        switch_prob=mix.switch_probability,
        label_smoothing=label_smoothing,
        num_classes=num_classes,
    )


@contextmanager
def _seeded(rng: np.random.Generator) -> Iterator[None]:
    """Python's, NumPy's and torch's global generators follow ``rng`` inside, and go on afterwards as if nothing was.

    timm and torchvision draw from these, and from which one differs by transform. In a loader without processes they
    are the training's own; its GPUs' generators are never touched.
    """
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(int(rng.integers(_LARGEST_SEED)))
    np.random.seed(rng.integers(2**32, size=4, dtype=np.uint32))
    torch.default_generator.manual_seed(int(rng.integers(_LARGEST_SEED)))
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
