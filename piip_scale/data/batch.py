"""What the loader hands to a task: one rank's images and their instances, in pixels of the padded batch."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from typing_extensions import Self

MASK_SIZE_PX = 112
"""Side of an instance's mini-mask: its box, stretched to this square."""


@dataclass(frozen=True)
class Polygons:
    """Outlines of N objects, each of any number of polygons, as few tensors on the CPU.

    Attributes:
        points_xy_px: The corners of all polygons in turn, in the resized image, float32 (P, 2).
        num_points: Of each polygon, int64 (Q,).
        num_polygons: Of each object, int64 (N,).
    """

    points_xy_px: Tensor
    num_points: Tensor
    num_polygons: Tensor

    def __len__(self) -> int:
        return len(self.num_polygons)

    def per_object(self) -> list[tuple[Tensor, ...]]:
        """The polygons of each object, float32 (M, 2) each; views."""
        polygons = self.points_xy_px.split(self.num_points.tolist())
        ends = self.num_polygons.cumsum(0).tolist()
        return [polygons[end - number : end] for end, number in zip(ends, self.num_polygons.tolist(), strict=True)]


@dataclass(frozen=True)
class Instances:
    """The objects of one image, N of them.

    Attributes:
        boxes_xyxy_px: Boxes in the resized image, float32 (N, 4).
        labels: Class indices, int64 (N,).
        is_crowd: Regions of many objects, to be ignored by training, bool (N,), on the CPU: to choose by it on a device
            would be to wait for that.
        mini_masks: Anti-aliased masks cut to their boxes, uint8 0-255 (N, MASK_SIZE_PX, MASK_SIZE_PX);
            ``None`` for a data set without masks.
        polygons: Outlines, cut to the image; only where the config asks for them.
    """

    boxes_xyxy_px: Tensor
    labels: Tensor
    is_crowd: Tensor
    mini_masks: Tensor | None = None
    polygons: Polygons | None = None

    def to(self, device: torch.device | str) -> Instances:
        """A copy on ``device``, but for what stays on the CPU."""

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        masks = None if self.mini_masks is None else moved(self.mini_masks)
        return replace(self, boxes_xyxy_px=moved(self.boxes_xyxy_px), labels=moved(self.labels), mini_masks=masks)


@dataclass(frozen=True)
class ImageInfo:
    """Where an image of a batch comes from, and how to go back to its own pixels.

    Attributes:
        key: The sample's key in its shard.
        image_id: The id in the COCO file.
        original_size_px: Height and width of the stored image.
        size_px: Height and width of the resized (and cropped) image inside the padded batch.
        scale_xy: Resized over original, for x and y. Boxes over this give original pixels, where nothing was cropped;
            crops for classification have no such scale, and here that of their whole image.
    """

    key: str
    image_id: int
    original_size_px: tuple[int, int]
    size_px: tuple[int, int]
    scale_xy: tuple[float, float]


@dataclass(frozen=True)
class Batch:
    """One rank's micro-batch of B images; each task's adds the targets.

    Attributes:
        images_BHWC: RGB, uint8 (B, H, W, 3); each image at the top left, the rest zero; H and W are multiples of
            the augmentation's ``pad_multiple_px``.
        infos: One entry per image.
    """

    images_BHWC: Tensor
    infos: tuple[ImageInfo, ...]

    def __len__(self) -> int:
        return len(self.infos)

    def to(self, device: torch.device | str) -> Self:
        """A copy on ``device``."""
        return replace(self, images_BHWC=self.images_BHWC.to(device, non_blocking=True))


@dataclass(frozen=True)
class DetectionBatch(Batch):
    """Images and their objects.

    Attributes:
        instances: One entry per image.
    """

    instances: tuple[Instances, ...]

    def to(self, device: torch.device | str) -> Self:
        """A copy on ``device``."""
        return replace(super().to(device), instances=tuple(instances.to(device) for instances in self.instances))


@dataclass(frozen=True)
class ClassificationBatch(Batch):
    """Square images and their classes.

    Attributes:
        labels: Class indices, int64 (B,).
        soft_labels_BK: Targets of mixed images over the K classes, float32 (B, K), each summing to 1, smoothing
            included; ``None`` for images as they are.
    """

    labels: Tensor
    soft_labels_BK: Tensor | None = None

    def to(self, device: torch.device | str) -> Self:
        """A copy on ``device``."""
        soft = None if self.soft_labels_BK is None else self.soft_labels_BK.to(device, non_blocking=True)
        labels = self.labels.to(device, non_blocking=True)
        return replace(super().to(device), labels=labels, soft_labels_BK=soft)


@dataclass(frozen=True)
class SegmentationBatch(Batch):
    """Images and the classes of their pixels.

    Attributes:
        labels_BHW: uint8; 255 belongs to no class. In training of the images' height and width; in evaluation those
            of the stored images, each at the top left, and 255 elsewhere.
    """

    labels_BHW: Tensor

    def to(self, device: torch.device | str) -> Self:
        """A copy on ``device``."""
        return replace(super().to(device), labels_BHW=self.labels_BHW.to(device, non_blocking=True))
