"""The one doorway to mmdet: whatever the tasks need of it, imported after the stand-in for its compiled ops."""

from typing import Any

from piip_scale.tasks import mmcv_ext
from piip_scale.tasks.absent import absent

mmcv_ext.install()
# They import these where they find them, for language models, a tracker and a strategy that nothing here uses: 2 s of a
# core. DeepSpeed's own import, where there is one, comes from the engine.
with absent("deepspeed", "sklearn", "transformers"):
    import mmcv.ops
    import mmdet.models  # registers mmdet's modules
    from mmdet.models.dense_heads import DINOHead, RPNHead
    from mmdet.models.detectors import DINO
    from mmdet.models.layers import CdnQueryGenerator, inverse_sigmoid
    from mmdet.models.losses import CrossEntropyLoss, FocalLoss, GIoULoss, L1Loss, SmoothL1Loss
    from mmdet.models.losses.iou_loss import giou_loss
    from mmdet.models.losses.smooth_l1_loss import l1_loss, smooth_l1_loss
    from mmdet.models.roi_heads import FCNMaskHead, SingleRoIExtractor
    from mmdet.models.task_modules import (
        AssignResult,
        DeltaXYWHBBoxCoder,
        MaxIoUAssigner,
        RandomSampler,
        SamplingResult,
    )
    from mmdet.registry import MODELS, TASK_UTILS
    from mmdet.structures import DetDataSample
    from mmdet.structures.bbox import bbox_cxcywh_to_xyxy, bbox_xyxy_to_cxcywh
    from mmdet.structures.mask import BaseInstanceMasks, BitmapMasks, PolygonMasks
    from mmdet.utils import reduce_mean
    from mmengine.config import Config, ConfigDict
    from mmengine.logging import MMLogger
    from mmengine.model import BaseModule
    from mmengine.registry import DefaultScope
    from mmengine.structures import InstanceData

PACKAGE_FOLDER: str = mmdet.__path__[0]


def find_class(name: str) -> Any:
    """What mmdet would build for ``type=name`` in a config, ``None`` where it knows no such name."""
    for registry in (MODELS, TASK_UTILS):
        if found := registry.get(name):
            return found
    return getattr(mmcv.ops, name, None) or getattr(mmdet.models.layers, name, None)


__all__ = [
    "DINO",
    "MODELS",
    "PACKAGE_FOLDER",
    "TASK_UTILS",
    "AssignResult",
    "BaseInstanceMasks",
    "BaseModule",
    "BitmapMasks",
    "CdnQueryGenerator",
    "Config",
    "ConfigDict",
    "CrossEntropyLoss",
    "DINOHead",
    "DefaultScope",
    "DeltaXYWHBBoxCoder",
    "DetDataSample",
    "FCNMaskHead",
    "FocalLoss",
    "GIoULoss",
    "InstanceData",
    "L1Loss",
    "MMLogger",
    "MaxIoUAssigner",
    "PolygonMasks",
    "RPNHead",
    "RandomSampler",
    "SamplingResult",
    "SingleRoIExtractor",
    "SmoothL1Loss",
    "bbox_cxcywh_to_xyxy",
    "bbox_xyxy_to_cxcywh",
    "find_class",
    "giou_loss",
    "inverse_sigmoid",
    "l1_loss",
    "reduce_mean",
    "smooth_l1_loss",
]
