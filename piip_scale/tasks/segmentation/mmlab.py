"""The one doorway to mmsegmentation, imported after mmdet's, which stands in for mmcv's compiled ops."""

from pathlib import Path
from typing import Any

from piip_scale.tasks import mmlab  # isort: skip - first: it installs what mmseg imports

import mmseg
import mmseg.models  # registers mmseg's modules
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample

CONFIG_FOLDER = Path(mmseg.__path__[0]) / ".mim" / "configs"


def find_class(name: str) -> Any:
    """What mmseg would build for ``type=name`` in a config, ``None`` where it knows no such name."""
    return MODELS.get(name) or mmlab.find_class(name)


__all__ = ["CONFIG_FOLDER", "MODELS", "PixelData", "SegDataSample", "find_class"]
