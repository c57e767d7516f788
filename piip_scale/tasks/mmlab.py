"""The one doorway to mmdet: whatever the tasks need of it, imported after the stand-in for its compiled ops."""

from piip_scale.tasks import mmcv_ext

mmcv_ext.install()

import mmdet.models  # noqa: E402 - registers mmdet's modules
from mmdet.registry import MODELS, TASK_UTILS  # noqa: E402
from mmdet.structures import DetDataSample  # noqa: E402
from mmdet.structures.mask import BaseInstanceMasks, BitmapMasks  # noqa: E402
from mmengine.config import Config, ConfigDict  # noqa: E402
from mmengine.logging import MMLogger  # noqa: E402
from mmengine.model import BaseModule  # noqa: E402
from mmengine.registry import DefaultScope  # noqa: E402
from mmengine.structures import InstanceData  # noqa: E402

PACKAGE_FOLDER: str = mmdet.__path__[0]

__all__ = [
    "MODELS",
    "PACKAGE_FOLDER",
    "TASK_UTILS",
    "BaseInstanceMasks",
    "BaseModule",
    "BitmapMasks",
    "Config",
    "ConfigDict",
    "DefaultScope",
    "DetDataSample",
    "InstanceData",
    "MMLogger",
]
