"""Between our batches and detections and mmdet's data samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from piip_scale.data.batch import DetectionBatch, ImageInfo, Instances, Polygons
from piip_scale.errors import DataError
from piip_scale.tasks.base import Detections
from piip_scale.tasks.detection.mask_results import encode_masks
from piip_scale.tasks.detection.mini_masks import MiniMasks
from piip_scale.tasks.mmlab import DetDataSample, InstanceData, PolygonMasks


def data_samples(batch: DetectionBatch, with_masks: bool) -> list[DetDataSample]:
    """One mmdet sample per image: its sizes, its objects, and the crowds to ignore.

    Args:
        batch: The batch, on the device of the heads.
        with_masks: Whether the detector trains on masks.

    Raises:
        DataError: Masks are wanted and the batch has none.
    """
    padded_px = tuple(batch.images_BHWC.shape[1:3])
    return [
        _sample(instances, info, padded_px, with_masks)
        for instances, info in zip(batch.instances, batch.infos, strict=True)
    ]


def detections(prediction: dict[str, Any], info: ImageInfo) -> Detections:
    """What the heads found in one image, best first, on the CPU.

    Args:
        prediction: ``bboxes`` (N, 4) in px of the stored image, ``scores`` and ``labels`` (N,), and ``masks``,
            run lengths or a tensor (N, height, width) of its size, where the detector has them.
        info: The image.
    """
    order = prediction["scores"].argsort(descending=True, stable=True)
    height, width = info.original_size_px
    boxes = prediction["bboxes"][order].float().cpu()
    limit = torch.tensor([width, height, width, height], dtype=torch.float32)
    masks = prediction.get("masks")
    if isinstance(masks, Tensor):
        # Of an image in which nothing was found, or from heads that paste in a way of their own.
        masks = encode_masks(masks)
    return Detections(
        image_id=info.image_id,
        boxes_xyxy_px=boxes.clamp(min=0).minimum(limit),
        scores=prediction["scores"][order].float().cpu(),
        labels=prediction["labels"][order].long().cpu(),
        masks_rle=None if masks is None else [masks[index] for index in order.tolist()],
    )


def _sample(instances: Instances, info: ImageInfo, padded_px: tuple[int, ...], with_masks: bool) -> DetDataSample:
    sample = DetDataSample(metainfo=_sizes(info, padded_px))
    sample.gt_instances = _objects(instances, ~instances.is_crowd, info, with_masks)
    sample.ignored_instances = _objects(instances, instances.is_crowd, info, with_masks=False)
    return sample


def _sizes(info: ImageInfo, padded_px: tuple[int, ...]) -> dict[str, Any]:
    return {
        "img_id": info.image_id,
        "img_shape": info.size_px,
        "ori_shape": info.original_size_px,
        "scale_factor": info.scale_xy,
        "batch_input_shape": padded_px,
        "pad_shape": padded_px,
    }


def _objects(instances: Instances, keep: Tensor, info: ImageInfo, with_masks: bool) -> InstanceData:
    # Counted on the CPU, where ``is_crowd`` stays: the device is not waited for.
    rows = keep.nonzero().flatten()
    on_device = rows.to(instances.boxes_xyxy_px.device, non_blocking=True)
    objects = InstanceData(bboxes=instances.boxes_xyxy_px[on_device], labels=instances.labels[on_device])
    if instances.polygons is not None:
        objects.polygons = _outlines(instances.polygons, rows.tolist(), info)
    if not with_masks:
        return objects
    if instances.mini_masks is None:
        raise DataError(
            f"sample {info.key} has no instance masks",
            rule="this detector trains on masks",
            fix="pack the shards with masks, or set detector.kind='faster_rcnn'",
        )
    objects.masks = MiniMasks(instances.mini_masks[on_device], objects.bboxes, *info.size_px)
    return objects


def _outlines(polygons: Polygons, rows: Sequence[int], info: ImageInfo) -> PolygonMasks:
    """The outlines of some objects in the shape in which mmdet's heads take them."""
    objects = polygons.per_object()
    outlines = [[outline.flatten().numpy() for outline in objects[row]] for row in rows]
    return PolygonMasks(outlines, *info.size_px)
