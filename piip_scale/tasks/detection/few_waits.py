"""mmdet's parts of a box detector that ask the device for numbers, without asking: the same results.

A loop over objects, a ``nonzero`` or an index by booleans makes the host wait until the device has done all that was
launched, the network's forward pass included, and then leaves it without work. Each class here is its parent but for
that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from piip_scale.tasks.detection.mini_masks import MiniMasks
from piip_scale.tasks.mmlab import (
    MODELS,
    TASK_UTILS,
    AssignResult,
    CrossEntropyLoss,
    DeltaXYWHBBoxCoder,
    FCNMaskHead,
    InstanceData,
    L1Loss,
    MaxIoUAssigner,
    RandomSampler,
    RPNHead,
    SamplingResult,
    SingleRoIExtractor,
    SmoothL1Loss,
    l1_loss,
    smooth_l1_loss,
)


class SentConstants(TorchFunctionMode):
    """Inside, numbers of Python's or the host's memory are sent to the device without waiting for it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.new_tensor and len(args) == 2 and kwargs.keys() <= {"dtype"}:
            like, values = args
            dtype = kwargs.get("dtype", like.dtype)
            return torch.tensor(values, dtype=dtype).to(like.device, non_blocking=True)
        if func is Tensor.to and args[0].device.type == "cpu":
            kwargs = kwargs | {"non_blocking": True}
        return func(*args, **kwargs)


@TASK_UTILS.register_module()
class FewWaitsBoxCoder(DeltaXYWHBBoxCoder):  # type: ignore[misc]  # mmdet has no types
    """Boxes as differences from others, and back."""

    def encode(self, *args: Any, **options: Any) -> Tensor:
        """As mmdet's."""
        with SentConstants():
            deltas: Tensor = super().encode(*args, **options)
        return deltas

    def decode(self, *args: Any, **options: Any) -> Tensor:
        """As mmdet's."""
        with SentConstants():
            boxes: Tensor = super().decode(*args, **options)
        return boxes


@TASK_UTILS.register_module()
class FewWaitsMaxIoUAssigner(MaxIoUAssigner):  # type: ignore[misc]  # mmdet has no types
    """Matches boxes with objects by their overlap, all objects at once."""

    def assign(self, *args: Any, **options: Any) -> AssignResult:
        """As mmdet's."""
        with SentConstants():
            return super().assign(*args, **options)

    def assign_wrt_overlaps(self, overlaps: Tensor, gt_labels: Tensor) -> AssignResult:
        """As mmdet's: -1 for a box that is ignored, 0 for background, else an object's number from 1.

        Args:
            overlaps: Of K objects with N boxes (K, N).
            gt_labels: Of the objects (K,).
        """
        if 0 in overlaps.shape:
            return super().assign_wrt_overlaps(overlaps, gt_labels)
        best, of_object = overlaps.max(dim=0)
        low, high = self.neg_iou_thr if isinstance(self.neg_iou_thr, tuple) else (0, self.neg_iou_thr)
        numbers = torch.where((best >= low) & (best < high), 0, -1)
        numbers = torch.where(best >= self.pos_iou_thr, of_object + 1, numbers)
        if self.match_low_quality:
            # Of objects with the same best box the last has it.
            last = self._best_boxes(overlaps).amax(0)
            numbers = torch.where(last > 0, last, numbers)
        labels = torch.where(numbers > 0, gt_labels[(numbers - 1).clamp(min=0)], -1)
        return AssignResult(num_gts=len(overlaps), gt_inds=numbers, max_overlaps=best, labels=labels)

    def _best_boxes(self, overlaps: Tensor) -> Tensor:
        """Each object's number where a box is its best and good enough, else 0 (K, N)."""
        highest, first = overlaps.max(dim=1, keepdim=True)
        if self.gt_max_assign_all:
            is_best = overlaps == highest
        else:
            is_best = torch.zeros_like(overlaps, dtype=torch.bool).scatter_(1, first, True)
        numbers = torch.arange(1, len(overlaps) + 1, device=overlaps.device)[:, None]
        chosen: Tensor = numbers * (is_best & (highest >= self.min_pos_iou))
        return chosen


@TASK_UTILS.register_module()
class FewWaitsRandomSampler(RandomSampler):  # type: ignore[misc]  # mmdet has no types
    """Draws boxes for training; asks once how many there are to draw from."""

    def sample(
        self, assign_result: AssignResult, pred_instances: InstanceData, gt_instances: InstanceData, **_: Any
    ) -> SamplingResult:
        """As mmdet's, with the same draws from torch's generator of the CPU.

        Args:
            assign_result: Which box belongs to which object.
            pred_instances: The boxes.
            gt_instances: The objects.
        """
        boxes, objects = pred_instances.priors, gt_instances.bboxes
        is_object = boxes.new_zeros(len(boxes), dtype=torch.uint8)
        if self.add_gt_as_proposals and len(objects):
            boxes = torch.cat([objects, boxes])
            assign_result.add_gt_(gt_instances.labels)
            is_object = torch.cat([is_object.new_ones(len(objects)), is_object])
        masks = assign_result.gt_inds > 0, assign_result.gt_inds == 0
        num_found: list[int] = torch.stack([mask.sum() for mask in masks]).tolist()
        wanted = int(self.num * self.pos_fraction)
        positive = _drawn(masks[0], num_found[0], wanted)
        wanted = self.num - len(positive)
        if self.neg_pos_ub >= 0:
            wanted = min(wanted, int(self.neg_pos_ub * max(1, len(positive))))
        negative = _drawn(masks[1], num_found[1], wanted)
        return SamplingResult(positive, negative, boxes, objects, assign_result, is_object)


def _drawn(mask: Tensor, num_found: int, wanted: int) -> Tensor:
    """Indices where the mask is set, at most as many as wanted, ascending."""
    found = torch.nonzero_static(mask, size=num_found)[:, 0]
    if num_found <= wanted:
        return found
    order = torch.randperm(num_found)[:wanted].to(mask.device, non_blocking=True)
    return found[order].sort()[0]


@MODELS.register_module()
class FewWaitsRoIExtractor(SingleRoIExtractor):  # type: ignore[misc]  # mmdet has no types
    """Takes each RoI's features from its level; asks once how many RoIs each level has."""

    def forward(self, feats: Sequence[Tensor], rois: Tensor, roi_scale_factor: float | None = None) -> Tensor:
        """Features (R, C, *output_size) of RoIs (R, 5), as mmdet's."""
        if len(feats) == 1:
            whole: Tensor = super().forward(feats, rois, roi_scale_factor)
            return whole
        rois = rois.type_as(feats[0])
        level_of_roi = self.map_roi_levels(rois, len(feats))
        if roi_scale_factor is not None:
            rois = self.roi_rescale(rois, roi_scale_factor)
        order = level_of_roi.argsort(stable=True)
        levels = torch.arange(len(feats), device=rois.device)[:, None]
        sizes: list[int] = (level_of_roi == levels).sum(1).tolist()
        out = feats[0].new_zeros(len(rois), self.out_channels, *self.roi_layers[0].output_size)
        for layer, feature, own in zip(self.roi_layers, feats, order.split(sizes), strict=False):
            if len(own):
                out[own] = layer(feature, rois[own])
            else:
                # Every level is part of the graph, or backward passes differ between ranks.
                out = out + feature.sum() * 0.0
        return out


@MODELS.register_module()
class FewWaitsRPNHead(RPNHead):  # type: ignore[misc]  # mmdet has no types
    """Proposes boxes; knows from sizes alone where every anchor lies in the padded image."""

    def get_anchors(self, featmap_sizes: Any, batch_img_metas: Any, device: Any = "cuda") -> Any:
        """As mmdet's, and remembers whether all anchors are valid in all images."""
        paddeds = [meta["pad_shape"] for meta in batch_img_metas]
        self._all_valid = self.train_cfg is not None and self.train_cfg["allowed_border"] < 0
        for (height, width), stride in zip(featmap_sizes, self.prior_generator.strides, strict=True):
            inside = (math.ceil(h / stride[1]) >= height and math.ceil(w / stride[0]) >= width for h, w in paddeds)
            self._all_valid = self._all_valid and all(inside)
        return super().get_anchors(featmap_sizes, batch_img_metas, device)

    def _get_targets_single(
        self, flat_anchors: Tensor, valid_flags: Tensor, *others: Any, unmap_outputs: bool = True
    ) -> Any:
        if not self._all_valid:
            return super()._get_targets_single(flat_anchors, valid_flags, *others, unmap_outputs=unmap_outputs)
        # Taken as an index by mmdet; as one of numbers it needs no counting, and nothing has to be mapped back.
        everywhere = torch.arange(len(flat_anchors), device=flat_anchors.device)
        return super()._get_targets_single(flat_anchors, everywhere, *others, unmap_outputs=False)


@MODELS.register_module()
class FewWaitsFCNMaskHead(FCNMaskHead):  # type: ignore[misc]  # mmdet has no types
    """Predicts masks; crops their targets where they are."""

    def get_targets(
        self,
        sampling_results: Sequence[SamplingResult],
        batch_gt_instances: Sequence[InstanceData],
        rcnn_train_cfg: Any,
    ) -> Tensor:
        """Targets (P, *mask_size) of all images' positive boxes, as mmdet's."""
        masks = [objects.masks for objects in batch_gt_instances]
        if rcnn_train_cfg.get("soft_mask_target", False) or not all(isinstance(own, MiniMasks) for own in masks):
            targets: Tensor = super().get_targets(sampling_results, batch_gt_instances, rcnn_train_cfg)
            return targets
        size = rcnn_train_cfg.mask_size
        size = (size, size) if isinstance(size, int) else tuple(size)
        crops = [
            own.crops(found.pos_priors, size, found.pos_assigned_gt_inds)
            for own, found in zip(masks, sampling_results, strict=True)
        ]
        return (torch.cat(crops) >= MiniMasks.COVERED).float()


class _AllWeights:
    """A loss whose weights may all be zero: then it is zero by itself, with zero gradients."""

    _function: Any

    def _options(self) -> dict[str, Any]:
        return {}

    def forward(
        self,
        pred: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        avg_factor: float | None = None,
        reduction_override: str | None = None,
        **_: Any,
    ) -> Tensor:
        if weight is not None and weight.dim() == pred.dim() - 1:
            weight = weight.unsqueeze(1)
        loss = type(self)._function(
            pred,
            target,
            weight,
            reduction=reduction_override or self.reduction,  # type: ignore[attr-defined]
            avg_factor=avg_factor,
            **self._options(),
        )
        return self.loss_weight * loss  # type: ignore[attr-defined,no-any-return]


@MODELS.register_module()
class FewWaitsL1Loss(_AllWeights, L1Loss):  # type: ignore[misc]  # mmdet has no types
    """mmdet's L1 loss."""

    _function = staticmethod(l1_loss)


@MODELS.register_module()
class FewWaitsSmoothL1Loss(_AllWeights, SmoothL1Loss):  # type: ignore[misc]  # mmdet has no types
    """mmdet's smooth L1 loss."""

    _function = staticmethod(smooth_l1_loss)

    def _options(self) -> dict[str, Any]:
        return {"beta": self.beta}


@MODELS.register_module()
class FewWaitsCrossEntropyLoss(CrossEntropyLoss):  # type: ignore[misc]  # mmdet has no types
    """Cross entropy; with sigmoids, labels become targets of all classes in one comparison."""

    def forward(
        self, cls_score: Tensor, label: Tensor, weight: Tensor | None = None, *args: Any, **options: Any
    ) -> Tensor:
        """As mmdet's."""
        if self.use_sigmoid and cls_score.dim() == label.dim() + 1:
            ignored = options.get("ignore_index")
            ignored = self.ignore_index if ignored is None else ignored
            valid = (label >= 0) & (label != (-100 if ignored is None else ignored))
            own = valid.float() if weight is None else weight * valid
            classes = torch.arange(cls_score.shape[-1], device=label.device)
            label = ((label[:, None] == classes) & valid[:, None]).long()
            weight = own[:, None].expand(cls_score.shape)
        loss: Tensor = super().forward(cls_score, label, weight, *args, **options)
        return loss


TWINS = {
    "DeltaXYWHBBoxCoder": "FewWaitsBoxCoder",
    "MaxIoUAssigner": "FewWaitsMaxIoUAssigner",
    "RandomSampler": "FewWaitsRandomSampler",
    "SingleRoIExtractor": "FewWaitsRoIExtractor",
    "RPNHead": "FewWaitsRPNHead",
    "FCNMaskHead": "FewWaitsFCNMaskHead",
    "L1Loss": "FewWaitsL1Loss",
    "SmoothL1Loss": "FewWaitsSmoothL1Loss",
    "CrossEntropyLoss": "FewWaitsCrossEntropyLoss",
}
"""mmdet's names, and those of the classes here."""
