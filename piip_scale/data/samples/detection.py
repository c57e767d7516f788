"""Detection's samples: from stored bytes to batches of images and objects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from piip_scale.config.detection import AugmentConfig
from piip_scale.data.augment.canvas import blank_canvas
from piip_scale.data.augment.geometry import Geometry
from piip_scale.data.augment.photometric import drawn_colours, recoloured
from piip_scale.data.augment.transforms import Target, apply_geometry, evaluation_geometry, training_geometry
from piip_scale.data.batch import DetectionBatch, ImageInfo, Instances, Polygons
from piip_scale.data.images import Image
from piip_scale.data.reading.decoding import decode_sample
from piip_scale.data.reading.raw import RawSample
from piip_scale.data.reading.sample_set import SampleSet


@dataclass(frozen=True)
class PackedObjects:
    """A detection batch on its way from a worker; the objects of all images lie in one tensor a kind.

    Attributes:
        images_BHWC: As in ``Batch``.
        objects: Boxes, labels, crowd flags and, for a set with masks, mini-masks of all images in turn.
        num_objects: Per image.
        infos: As in ``Batch``.
        polygons: Outlines of all images' objects, where the config asks for them.
    """

    images_BHWC: Tensor
    objects: tuple[Tensor, ...]
    num_objects: tuple[int, ...]
    infos: tuple[ImageInfo, ...]
    polygons: Polygons | None = None

    def pin_memory(self) -> PackedObjects:
        """A copy in page-locked memory."""
        pinned = tuple(tensor.pin_memory() for tensor in self.objects)
        outlines = self.polygons
        if outlines is not None:
            outlines = replace(outlines, points_xy_px=outlines.points_xy_px.pin_memory())
        return replace(self, images_BHWC=self.images_BHWC.pin_memory(), objects=pinned, polygons=outlines)

    def batch(self) -> DetectionBatch:
        """The batch; its instances are views."""
        per_image = zip(*(tensor.split(self.num_objects) for tensor in self.objects), strict=True)
        instances = [Instances(*tensors) for tensors in per_image]
        if self.polygons is not None:
            parts = _polygons_per_image(self.polygons, self.num_objects)
            instances = [replace(one, polygons=part) for one, part in zip(instances, parts, strict=True)]
        return DetectionBatch(self.images_BHWC, self.infos, tuple(instances))


def _polygons_per_image(polygons: Polygons, num_objects: tuple[int, ...]) -> list[Polygons]:
    of_objects = polygons.num_polygons.split(num_objects)
    of_polygons = polygons.num_points.split([int(part.sum()) for part in of_objects])
    points = polygons.points_xy_px.split([int(part.sum()) for part in of_polygons])
    return [Polygons(*parts) for parts in zip(points, of_polygons, of_objects, strict=True)]


@dataclass(frozen=True)
class Prepared:
    """A sample of which all is known but the canvas that its image will be drawn on.

    Attributes:
        pixels: The stored image or a part of it, RGB, uint8 (H, W, 3).
        geometry: How that becomes network input.
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
        shards: The set, for its labels and whether there are masks.
        augment: How an image becomes network input.
        polygons: Give the objects' outlines too.
    """

    def __init__(self, shards: SampleSet, augment: AugmentConfig, *, polygons: bool = False) -> None:
        self._label_of_category, self._has_masks = shards.label_of_category, shards.has_masks
        self._augment, self._polygons = augment, polygons

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
        recompute = self._augment.recompute_boxes
        target = apply_geometry(sample, geometry, recompute_boxes=recompute, polygons=self._polygons)
        pixels = sample.pixels
        if rng is not None and self._augment.photometric is not None:
            # Of the stored pixels, whose number does not depend on the scale; only of those that will be seen.
            pixels, geometry = geometry.cut(pixels)
            pixels = recoloured(np.ascontiguousarray(pixels), drawn_colours(self._augment.photometric, rng))
        return Prepared(pixels, geometry, target, info)

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
        infos = tuple(sample.info for sample in samples)
        return PackedObjects(images, _objects(targets), num_objects, infos, _polygons(targets))


def _objects(targets: Sequence[Target]) -> tuple[Tensor, ...]:
    kinds = [(target.boxes_xyxy_px, target.labels, target.is_crowd, target.mini_masks) for target in targets]
    return tuple(torch.from_numpy(np.concatenate(kind)) for kind in zip(*kinds, strict=True) if kind[0] is not None)


def _polygons(targets: Sequence[Target]) -> Polygons | None:
    if any(target.polygons is None for target in targets):
        return None
    objects = [outlines for target in targets for outlines in target.polygons or ()]
    outlines = [outline for of_object in objects for outline in of_object]
    points = np.concatenate([np.empty((0, 2)), *outlines]).astype(np.float32)
    counts = [len(outline) for outline in outlines], [len(of_object) for of_object in objects]
    return Polygons(torch.from_numpy(points), *(torch.tensor(numbers, dtype=torch.long) for numbers in counts))
