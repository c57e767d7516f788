"""The one doorway to mmdet: whatever the tasks need of it, imported after the stand-in for its compiled ops."""

import os
from typing import Any

import torch

from piip_scale.tasks import mmcv_ext

mmcv_ext.install()
# mmengine imports DeepSpeed where it finds it, which warns of a machine without GPU unless it is set.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

import mmcv.ops  # noqa: E402
import mmdet.models  # noqa: E402 - registers mmdet's modules
from mmdet.models.dense_heads import DINOHead, RPNHead  # noqa: E402
from mmdet.models.detectors import DINO  # noqa: E402
from mmdet.models.layers import CdnQueryGenerator, inverse_sigmoid  # noqa: E402
from mmdet.models.losses import CrossEntropyLoss, FocalLoss, GIoULoss, L1Loss, SmoothL1Loss  # noqa: E402
from mmdet.models.losses.iou_loss import giou_loss  # noqa: E402
from mmdet.models.losses.smooth_l1_loss import l1_loss, smooth_l1_loss  # noqa: E402
from mmdet.models.roi_heads import FCNMaskHead, SingleRoIExtractor  # noqa: E402
from mmdet.models.task_modules import AssignResult, DeltaXYWHBBoxCoder, MaxIoUAssigner, RandomSampler, SamplingResult  # noqa: E402
from mmdet.registry import MODELS, TASK_UTILS  # noqa: E402
from mmdet.structures import DetDataSample  # noqa: E402
from mmdet.structures.bbox import bbox_cxcywh_to_xyxy, bbox_xyxy_to_cxcywh  # noqa: E402
from mmdet.structures.mask import BaseInstanceMasks, BitmapMasks, PolygonMasks  # noqa: E402
from mmdet.utils import reduce_mean  # noqa: E402
from mmengine.config import Config, ConfigDict  # noqa: E402
from mmengine.logging import MMLogger  # noqa: E402
from mmengine.model import BaseModule  # noqa: E402
from mmengine.registry import DefaultScope  # noqa: E402
from mmengine.structures import InstanceData  # noqa: E402

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
