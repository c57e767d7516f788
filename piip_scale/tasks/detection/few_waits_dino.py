"""mmdet's DINO that asks the device for numbers once a loss, not for each layer and image: the same results.

Matching needs numbers on the host: those of all layers and images go there together. How many queries will match is
known without it, from the numbers of objects alone, and so are a map's sides. One question stays besides, how many
labels the denoising changes: mmdet draws as many random ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from piip_scale.tasks.detection.few_waits import SentConstants
from piip_scale.tasks.mmcv_ext.install import is_stand_in
from piip_scale.tasks.mmlab import (
    DINO,
    MODELS,
    CdnQueryGenerator,
    DetDataSample,
    DINOHead,
    FocalLoss,
    GIoULoss,
    InstanceData,
    bbox_cxcywh_to_xyxy,
    bbox_xyxy_to_cxcywh,
    giou_loss,
    reduce_mean,
)

Losses = tuple[Tensor, Tensor, Tensor]
"""Of classes, of boxes by L1, of boxes by GIoU."""


class HostNumbers(Tensor):
    """Numbers that stay on the host while what is computed of them alone does; beside other tensors they go there."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        others = (
            leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and not isinstance(leaf, cls)
        )
        other = next(others, None)
        if other is None:
            return super().__torch_function__(func, types, args, kwargs)

        def plain(leaf: Any) -> Any:
            if not isinstance(leaf, cls):
                return leaf
            number = leaf.as_subclass(Tensor)
            # A single one is an argument of the kernel, or a size.
            return number if number.dim() == 0 else number.to(other.device, non_blocking=True)

        return func(*tree_map(plain, args), **tree_map(plain, kwargs))


@MODELS.register_module()
class FewWaitsDINO(DINO):  # type: ignore[misc]  # mmdet has no types
    """The detector; knows its maps' sides on the host."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        # mmdet builds it by name, and a second one would draw its weights a second time.
        self.dn_query_generator.__class__ = FewWaitsQueryGenerator

    def pre_transformer(self, mlvl_feats: Sequence[Tensor], *args: Any, **options: Any) -> tuple[dict[str, Any], ...]:
        """As mmdet's, but that the sides and starts of the levels stay on the host."""
        with SentConstants():
            inputs = super().pre_transformer(mlvl_feats, *args, **options)
        # A compiled mmcv's kernels read them on the device.
        if is_stand_in():
            sides = torch.tensor([feature.shape[-2:] for feature in mlvl_feats]).as_subclass(HostNumbers)
            starts = torch.cat((sides.new_zeros((1,)), sides.prod(1).cumsum(0)[:-1]))
            inputs = tuple(own | {"spatial_shapes": sides, "level_start_index": starts} for own in inputs)
        encoder_inputs, decoder_inputs = inputs
        return encoder_inputs, decoder_inputs


class FewWaitsQueryGenerator(CdnQueryGenerator):  # type: ignore[misc]  # mmdet has no types
    """Makes denoising queries; counts objects by the tensors' sizes."""

    def __call__(self, batch_data_samples: Sequence[DetDataSample]) -> tuple[Any, ...]:
        """As mmdet's."""
        self._num_targets = [len(sample.gt_instances.bboxes) for sample in batch_data_samples]
        with SentConstants():
            queries: tuple[Any, ...] = super().__call__(batch_data_samples)
        return queries

    def collate_dn_queries(
        self, input_label_query: Tensor, input_bbox_query: Tensor, batch_idx: Tensor, batch_size: int, num_groups: int
    ) -> tuple[Tensor, Tensor]:
        """As mmdet's: all images' noisy objects (N, ...) by image, with gaps (B, queries, ...)."""
        most, copies = max(self._num_targets), 2 * num_groups
        places = torch.cat([torch.arange(number) for number in self._num_targets])
        places = (places + most * torch.arange(copies)[:, None]).flatten()
        mapper = (batch_idx.repeat(copies), places.to(batch_idx.device, non_blocking=True))
        collated = []
        for query in (input_label_query, input_bbox_query):
            batched = torch.zeros(batch_size, most * copies, query.shape[-1], device=query.device)
            batched[mapper] = query
            collated.append(batched)
        return collated[0], collated[1]


@dataclass(frozen=True)
class _Stage:
    """What one layer, or the encoder, says of all images.

    Attributes:
        scores_BQC: Logits.
        boxes_BQ4: cx, cy, w, h as shares of the image.
    """

    scores_BQC: Tensor
    boxes_BQ4: Tensor


@dataclass(frozen=True)
class _Divisors:
    """What sums of losses are divided by: the mean over ranks."""

    classes: Tensor | float
    boxes: float


@dataclass(frozen=True)
class _Objects:
    """All images' objects.

    Attributes:
        instances: mmdet's, an image each.
        sizes_B4: Width, height, width, height in px.
        infos: mmdet's, an image each.
    """

    instances: Sequence[InstanceData]
    sizes_B4: Tensor
    infos: Sequence[dict[str, Any]]

    @property
    def counts(self) -> list[int]:
        """Objects of each image."""
        return [len(own) for own in self.instances]


@MODELS.register_module()
class FewWaitsDINOHead(DINOHead):  # type: ignore[misc]  # mmdet has no types
    """Matches queries with objects and gives the losses; waits for the device once."""

    def loss_by_feat(
        self,
        all_layers_cls_scores: Tensor,
        all_layers_bbox_preds: Tensor,
        enc_cls_scores: Tensor | None,
        enc_bbox_preds: Tensor | None,
        batch_gt_instances: Sequence[InstanceData],
        batch_img_metas: Sequence[dict[str, Any]],
        dn_meta: dict[str, int],
        batch_gt_instances_ignore: Any = None,
    ) -> dict[str, Tensor]:
        """Named losses, as mmdet's."""
        given = (all_layers_cls_scores, all_layers_bbox_preds, enc_cls_scores, enc_bbox_preds)
        others = (batch_gt_instances, batch_img_metas, dn_meta, batch_gt_instances_ignore)
        if type(self.loss_cls) is not FocalLoss or enc_cls_scores is None or enc_bbox_preds is None:
            losses: dict[str, Tensor] = super().loss_by_feat(*given, *others)
            return losses
        parts = self.split_outputs(all_layers_cls_scores, all_layers_bbox_preds, dn_meta)
        matching = [*_stages(parts[0], parts[1]), _Stage(enc_cls_scores, enc_bbox_preds)]
        with SentConstants():
            objects = _Objects(batch_gt_instances, _sizes(batch_img_metas, enc_bbox_preds), batch_img_metas)
            found = self._matched(matching, objects, dn_meta)
            *decoder, encoder = found[0]
            named = _named(decoder) | dict(zip(("enc_loss_cls", "enc_loss_bbox", "enc_loss_iou"), encoder, strict=True))
            targets = self.get_dn_targets(batch_gt_instances, batch_img_metas, dn_meta)[:4]
            joined = tuple(torch.cat(own) for own in targets)
            noisy = [self._losses(stage, joined, found[1], objects) for stage in _stages(parts[2], parts[3])]
        return named | _named(noisy, "dn_")

    def _matched(
        self, stages: Sequence[_Stage], objects: _Objects, dn_meta: dict[str, int]
    ) -> tuple[list[Losses], _Divisors]:
        """Losses of all stages' matches, and what those of the denoising are divided by."""
        means = self._means(stages[0], objects, dn_meta)
        with torch.no_grad():
            costs = [cost for stage in stages for cost in self._costs(stage, objects)]
            # The one time that the device is waited for.
            fetched = torch.cat([means.flatten(), *(cost.flatten() for cost in costs)]).cpu().numpy()
        matching, noisy = (
            self._divisors(own, means[row]) for row, own in enumerate(fetched[:4].reshape(2, 2).tolist())
        )
        matches = _matches(fetched[4:], [tuple(cost.shape) for cost in costs], means.device)
        losses = []
        for stage in stages:
            targets = [self._targets(stage, image, objects, next(matches)) for image in range(len(objects.infos))]
            joined = tuple(torch.cat(own) for own in zip(*targets, strict=True))
            losses.append(self._losses(stage, joined, matching, objects))
        return losses, noisy

    def _means(self, stage: _Stage, objects: _Objects, dn_meta: dict[str, int]) -> Tensor:
        """Rows: matching, denoising; columns: what classes and boxes are divided by, at least 1 to come. Collective."""
        batch, queries = stage.scores_BQC.shape[:2]
        matched = sum(min(queries, count) for count in objects.counts)
        # Each object's noisy copies count as found and as background.
        noisy = dn_meta["num_denoising_groups"] * sum(objects.counts)
        pairs = ((matched, batch * queries - matched), (noisy, noisy))
        rows = [[found * 1.0 + background * self.bg_cls_weight, found] for found, background in pairs]
        means: Tensor = reduce_mean(stage.scores_BQC.new_tensor(rows))
        return means

    def _divisors(self, means: Sequence[float], on_device: Tensor) -> _Divisors:
        of_classes, of_boxes = means
        # A tensor where mmdet has one: on a GPU a division by a number rounds otherwise.
        takes_tensor = self.sync_cls_avg_factor and of_classes >= 1
        return _Divisors(on_device[:1] if takes_tensor else max(of_classes, 1), max(of_boxes, 1.0))

    def _costs(self, stage: _Stage, objects: _Objects) -> Iterator[Tensor]:
        """Of each image's queries with its objects (Q, objects)."""
        for image, info in enumerate(objects.infos):
            boxes = bbox_cxcywh_to_xyxy(stage.boxes_BQ4[image]) * objects.sizes_B4[image][None]
            found, own = InstanceData(scores=stage.scores_BQC[image], bboxes=boxes), objects.instances[image]
            if len(own) == 0:
                yield boxes.new_zeros(len(boxes), 0)
                continue
            costs = self.assigner.match_costs
            yield torch.stack([cost(pred_instances=found, gt_instances=own, img_meta=info) for cost in costs]).sum(0)

    def _targets(
        self, stage: _Stage, image: int, objects: _Objects, match: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, ...]:
        """Labels, their weights, boxes and their weights of an image's queries, as mmdet's."""
        rows, columns = match
        own, boxes_Q4 = objects.instances[image], stage.boxes_BQ4[image]
        labels = own.bboxes.new_full((len(boxes_Q4),), self.num_classes, dtype=torch.long)
        labels[rows] = own.labels[columns]
        targets, weights = (torch.zeros_like(boxes_Q4, dtype=own.bboxes.dtype) for _ in range(2))
        weights[rows] = 1.0
        targets[rows] = bbox_xyxy_to_cxcywh(own.bboxes[columns] / objects.sizes_B4[image][None])
        return labels, own.bboxes.new_ones(len(boxes_Q4)), targets, weights

    def _losses(self, stage: _Stage, targets: tuple[Tensor, ...], divisors: _Divisors, objects: _Objects) -> Losses:
        labels, label_weights, box_targets, box_weights = targets
        scores = stage.scores_BQC.reshape(-1, self.cls_out_channels)
        if len(scores):
            of_classes = self.loss_cls(scores, labels, label_weights, avg_factor=divisors.classes)
        else:
            of_classes = scores.new_zeros(1)
        sizes = objects.sizes_B4.repeat_interleave(stage.boxes_BQ4.shape[1], 0, output_size=len(scores))
        boxes = stage.boxes_BQ4.reshape(-1, 4)
        corners, target_corners = (bbox_cxcywh_to_xyxy(own) * sizes for own in (boxes, box_targets))
        iou = self.loss_iou(corners, target_corners, box_weights, avg_factor=divisors.boxes)
        return of_classes, self.loss_bbox(boxes, box_targets, box_weights, avg_factor=divisors.boxes), iou


@MODELS.register_module()
class FewWaitsGIoULoss(GIoULoss):  # type: ignore[misc]  # mmdet has no types
    """mmdet's GIoU loss; where all weights are zero, it is zero by itself."""

    def forward(
        self,
        pred: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        avg_factor: Tensor | float | None = None,
        reduction_override: str | None = None,
        **options: Any,
    ) -> Tensor:
        """As mmdet's."""
        if weight is None or len(pred) == 0:
            loss: Tensor = super().forward(pred, target, weight, avg_factor, reduction_override, **options)
            return loss
        weight = weight.mean(-1) if weight.dim() > 1 else weight
        reduction = reduction_override or self.reduction
        with SentConstants():
            own = giou_loss(pred, target, weight, eps=self.eps, reduction=reduction, avg_factor=avg_factor, **options)
        scaled: Tensor = self.loss_weight * own
        return scaled


def _stages(scores_LBQC: Tensor, boxes_LBQ4: Tensor) -> list[_Stage]:
    return [_Stage(*own) for own in zip(scores_LBQC, boxes_LBQ4, strict=True)]


def _sizes(infos: Sequence[dict[str, Any]], like: Tensor) -> Tensor:
    return like.new_tensor([[width, height, width, height] for height, width in (own["img_shape"] for own in infos)])


def _named(losses: Sequence[Losses], prefix: str = "") -> dict[str, Tensor]:
    """The last layer's losses without its number, then the others'."""
    names = [f"{prefix}loss_{part}" for part in ("cls", "bbox", "iou")]
    named = dict(zip(names, losses[-1], strict=True))
    for layer, own in enumerate(losses[:-1]):
        named |= dict(zip((f"d{layer}.{name}" for name in names), own, strict=True))
    return named


def _matches(
    costs: np.ndarray, shapes: Sequence[tuple[int, ...]], device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Queries, ascending, and the objects they match, for each of the cost matrices; sent all at once."""
    from scipy.optimize import linear_sum_assignment

    ends = np.cumsum([int(np.prod(shape)) for shape in shapes])[:-1]
    pairs = [
        np.stack(linear_sum_assignment(own.reshape(shape)))
        for own, shape in zip(np.split(costs, ends), shapes, strict=True)
    ]
    sent = torch.from_numpy(np.concatenate(pairs, 1)).to(device, non_blocking=True)
    return iter([(own[0], own[1]) for own in sent.split([pair.shape[1] for pair in pairs], 1)])


TWINS = {"DINO": "FewWaitsDINO", "DINOHead": "FewWaitsDINOHead", "GIoULoss": "FewWaitsGIoULoss"}
"""mmdet's names, and those of the classes here."""
