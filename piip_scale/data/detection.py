"""Detection's samples: from stored bytes to batches of images and objects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from piip_scale.config.detection import AugmentConfig
from piip_scale.data.batch import DetectionBatch, ImageInfo, Instances
from piip_scale.data.canvas import blank_canvas
from piip_scale.data.geometry import Geometry
from piip_scale.data.sample import Image, RawSample, decode_sample
from piip_scale.data.shards import ShardSet
from piip_scale.data.transforms import Target, apply_geometry, evaluation_geometry, training_geometry


@dataclass(frozen=True)
class PackedObjects:
    """A detection batch on its way from a worker; the objects of all images lie in one tensor a kind.

    Attributes:
        images_BHWC: As in ``Batch``.
        objects: Boxes, labels, crowd flags and, for a set with masks, mini-masks of all images in turn.
        num_objects: Per image.
        infos: As in ``Batch``.
    """

    images_BHWC: Tensor
    objects: tuple[Tensor, ...]
    num_objects: tuple[int, ...]
    infos: tuple[ImageInfo, ...]

    def pin_memory(self) -> PackedObjects:
        """A copy in page-locked memory."""
        pinned = tuple(tensor.pin_memory() for tensor in self.objects)
        return replace(self, images_BHWC=self.images_BHWC.pin_memory(), objects=pinned)

    def batch(self) -> DetectionBatch:
        """The batch; its instances are views."""
        per_image = zip(*(tensor.split(self.num_objects) for tensor in self.objects), strict=True)
        return DetectionBatch(self.images_BHWC, self.infos, tuple(Instances(*tensors) for tensors in per_image))


@dataclass(frozen=True)
class Prepared:
    """A sample of which all is known but the canvas that its image will be drawn on.

    Attributes:
        pixels: The stored image, RGB, uint8 (H, W, 3).
        geometry: How it becomes network input.
        target: Its objects there.
        info: Where it comes from.
    """

    pixels: Image
    geometry: Geometry
    target: Target
    info: ImageInfo


class DetectionSamples:
    """Decodes, augments and batches images with boxes and masks: a ``SampleMaker``.

    Args:
        shards: The set; tells labels and whether there are masks.
        augment: How an image becomes network input.
    """

    def __init__(self, shards: ShardSet, augment: AugmentConfig) -> None:
        self._label_of_category, self._has_masks = shards.label_of_category, shards.manifest.has_masks
        self._augment = augment

    def sample(self, raw: RawSample, rng: np.random.Generator | None) -> Prepared:
        """A stored sample on its way to network input; without chance where ``rng`` is ``None``.

        Raises:
            DataError: The image or an annotation cannot be read.
        """
        sample = decode_sample(raw, self._label_of_category, has_masks=self._has_masks)
        height, width = sample.pixels.shape[:2]
        if rng is None:
            geometry = evaluation_geometry((height, width), self._augment)
        else:
            geometry = training_geometry((height, width), self._augment, rng)
        info = ImageInfo(sample.key, sample.image_id, (height, width), geometry.size_px, geometry.scale_xy)
        target = apply_geometry(sample, geometry, recompute_boxes=self._augment.recompute_boxes)
        return Prepared(sample.pixels, geometry, target, info)

    def collate(self, samples: Sequence[Prepared], *, training: bool) -> PackedObjects:
        """One canvas for all images, one tensor for each kind of annotation."""
        jitters = training and self._augment.jitter_scale is not None
        # Under jitter the canvas is the crop, as in mmdet's recipes: shapes stay the same from step to step.
        least_px = self._augment.crop_px if jitters else None
        sizes_px = [sample.geometry.size_px for sample in samples]
        images, places = blank_canvas(sizes_px, self._augment.pad_multiple_px, least_px)
        for sample, place in zip(samples, places, strict=True):
            sample.geometry.draw(sample.pixels, place)
        targets = [sample.target for sample in samples]
        num_objects = tuple(len(target.labels) for target in targets)
        return PackedObjects(images, _objects(targets), num_objects, tuple(sample.info for sample in samples))


def _objects(targets: Sequence[Target]) -> tuple[Tensor, ...]:
    kinds = [(target.boxes_xyxy_px, target.labels, target.is_crowd, target.mini_masks) for target in targets]
    return tuple(torch.from_numpy(np.concatenate(kind)) for kind in zip(*kinds, strict=True) if kind[0] is not None)
