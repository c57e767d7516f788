"""Segmentation's samples: from stored bytes to batches of images and label maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from piip_scale.config.segmentation import SegmentationAugment
from piip_scale.data.augment.canvas import canvas_of, label_canvas_of
from piip_scale.data.augment.map_transforms import augmented, resized_px
from piip_scale.data.augment.map_transforms import resized as resized_image
from piip_scale.data.batch import ImageInfo, SegmentationBatch
from piip_scale.data.images import Image
from piip_scale.data.reading.label_maps import decode_mapped
from piip_scale.data.reading.raw import RawSample
from piip_scale.data.reading.sample_set import SampleSet

Prepared = tuple[Image, Image, ImageInfo]
"""Image, label map and where they come from."""


@dataclass(frozen=True)
class PackedMaps:
    """A segmentation batch on its way from a worker; see ``SegmentationBatch``."""

    images_BHWC: Tensor
    labels_BHW: Tensor
    infos: tuple[ImageInfo, ...]

    def pin_memory(self) -> PackedMaps:
        """A copy in page-locked memory."""
        return replace(self, images_BHWC=self.images_BHWC.pin_memory(), labels_BHW=self.labels_BHW.pin_memory())

    def batch(self) -> SegmentationBatch:
        """The batch."""
        return SegmentationBatch(self.images_BHWC, self.infos, self.labels_BHW)


class SegmentationSamples:
    """Decodes, augments and batches images with label maps: a ``SampleMaker``.

    Args:
        shards: The set, for what its label maps mean.
        augment: How an image becomes network input.
    """

    def __init__(self, shards: SampleSet, augment: SegmentationAugment) -> None:
        self._rule, self._augment = shards.map_rule, augment

    def sample(self, raw: RawSample, rng: np.random.Generator | None) -> Prepared:
        """A stored sample as network input; without chance, and the label map as stored, where ``rng`` is ``None``.

        Raises:
            DataError: The image or the label map cannot be read.
        """
        sample = decode_mapped(raw, self._rule)
        stored_px = (sample.pixels.shape[0], sample.pixels.shape[1])
        if rng is None:
            size_px = resized_px(stored_px, self._augment.short_edge_px, self._augment.max_edge_px)
            pixels, labels = resized_image(sample.pixels, size_px), sample.labels
        else:
            pixels, labels, size_px = augmented(sample.pixels, sample.labels, self._augment, rng)
        scale_xy = (size_px[1] / stored_px[1], size_px[0] / stored_px[0])
        used_px = (pixels.shape[0], pixels.shape[1])
        return pixels, labels, ImageInfo(sample.key, sample.image_id, stored_px, used_px, scale_xy)

    def collate(self, samples: Sequence[Prepared], *, training: bool) -> PackedMaps:
        """One canvas for all images and one for all label maps; in training both have the crop's size."""
        images, labels, infos = zip(*samples, strict=True)
        least_px = self._augment.crop_px if training else None
        canvas = canvas_of(images, self._augment.pad_multiple_px, least_px)
        return PackedMaps(canvas, torch.from_numpy(label_canvas_of(labels, least_px)), infos)
