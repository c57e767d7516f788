"""Detection's samples: from stored bytes to batches of images and objects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from piip_scale.config.detection import AugmentConfig
from piip_scale.data.batch import DetectionBatch, ImageInfo, Instances
from piip_scale.data.canvas import canvas_of
from piip_scale.data.sample import RawSample, decode_sample
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


class DetectionSamples:
    """Decodes, augments and batches images with boxes and masks: a ``SampleMaker``.

    Args:
        shards: The set; tells labels and whether there are masks.
        augment: How an image becomes network input.
    """

    def __init__(self, shards: ShardSet, augment: AugmentConfig) -> None:
        self._label_of_category, self._has_masks = shards.label_of_category, shards.manifest.has_masks
        self._augment = augment

    def sample(self, raw: RawSample, rng: np.random.Generator | None) -> tuple[Target, ImageInfo]:
        """A stored sample as network input; without chance where ``rng`` is ``None``.

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
        return apply_geometry(sample, geometry, recompute_boxes=self._augment.recompute_boxes), info

    def collate(self, samples: Sequence[tuple[Target, ImageInfo]], *, training: bool) -> PackedObjects:
        """One canvas for all images, one tensor for each kind of annotation."""
        targets, infos = zip(*samples, strict=True)
        jitters = training and self._augment.jitter_scale is not None
        # Under jitter the canvas is the crop, as in mmdet's recipes: shapes stay the same from step to step.
        least_px = self._augment.crop_px if jitters else None
        images = canvas_of([target.pixels for target in targets], self._augment.pad_multiple_px, least_px)
        num_objects = tuple(len(target.labels) for target in targets)
        return PackedObjects(images, _objects(targets), num_objects, infos)


def _objects(targets: Sequence[Target]) -> tuple[Tensor, ...]:
    kinds = [(target.boxes_xyxy_px, target.labels, target.is_crowd, target.mini_masks) for target in targets]
    return tuple(torch.from_numpy(np.concatenate(kind)) for kind in zip(*kinds, strict=True) if kind[0] is not None)
