"""Released checkpoints as weights of a model here, whole: network, neck and heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from piip_scale.config.run import RunConfig
from piip_scale.errors import ModelError
from piip_scale.models.class_layers import SOME_CLASSES, num_classes_of
from piip_scale.models.misfits import describe_misfits, list_misfits
from piip_scale.models.released import from_released
from piip_scale.models.whole_file import read_whole_file, require_classes
from piip_scale.tasks.kinds import build_model

if TYPE_CHECKING:
    from piip_scale.tasks.base import TrainableModel

_FIX = "use the config of configs/ that its released one has become"


@dataclass(frozen=True)
class ImportedWeights:
    """A whole model's weights.

    Attributes:
        tensors: By our names and in our shapes, in the file's dtypes, mapped and not read.
        num_classes: Of the data set that it was trained on.
        classes: Their names in label order; empty where the file does not say.
    """

    tensors: dict[str, Tensor]
    num_classes: int
    classes: tuple[str, ...]


def import_released(config: RunConfig, path: Path) -> ImportedWeights:
    """A released detector, segmentor or classifier as weights of a run's model, every key accounted for.

    Args:
        config: A run of the same network and heads; where it names classes, they must be the file's.
        path: The checkpoint: ``.pth``, or one rank's ``mp_rank_00_model_states.pt``.

    Raises:
        ConfigError: The config's heads cannot be built.
        ModelError: The file is absent, damaged or of other classes, or a key is missing, left over or of another shape.
    """
    file = read_whole_file(path)
    require_classes(path, file.classes, config.data.classes, "set data.classes as they are there, or leave it out")
    some = _model(config, SOME_CLASSES[0])
    found = from_released(file.tensors, some.state_dict(), config.model)
    shapes = {name: tensor.shape for name, tensor in found.items()}
    num_classes = num_classes_of(cast("TrainableModel", some).class_layers(), shapes) or SOME_CLASSES[0]
    _check(path, found, _model(config, num_classes).state_dict())
    return ImportedWeights(found, num_classes, file.classes)


def _model(config: RunConfig, num_classes: int) -> nn.Module:
    with torch.device("meta"):
        return build_model(config, num_classes)


def _check(path: Path, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    misfits = list_misfits(found, wanted)
    if any(misfits.values()):
        raise ModelError(
            f"released weights {path} are not this config's model: {describe_misfits(misfits)}",
            rule="every key has one place",
            fix=_FIX,
        )
