"""A trained model that looks at images as a user asked: what is left out, how large ones are cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from piip_scale.engine.fp32_precision import apply_fp32_precision
from piip_scale.errors import ConfigError
from piip_scale.registry import row_of
from piip_scale.tasks.classes import class_names
from piip_scale.tasks.kinds import build_predictor
from piip_scale.tasks.spreading import named_devices

if TYPE_CHECKING:
    from piip_scale.data.images import Image
    from piip_scale.tasks.base import Predictor
    from piip_scale.tasks.detection.tiling import Tiling
    from piip_scale.tasks.trained import Trained


@dataclass(frozen=True)
class Looking:
    """How photographs are looked at.

    Attributes:
        threshold: Objects of a lesser score, classes of a lesser probability are neither drawn nor written; ``None``
            draws objects from 0.5 on, and writes everything.
        classes: Objects of others are left out; all where empty.
        tiling: How images too large for one look are cut; ``None`` looks once.
        batch_size: So many images, or tiles, are looked at together.
    """

    threshold: float | None = None
    classes: tuple[str, ...] = ()
    tiling: Tiling | None = None
    batch_size: int = 1


class Looker:
    """A trained model that looks at pixels as a user asked.

    Args:
        found: Config and weights.
        looking: How.
        devices: That the model is spread over, as ``named_devices`` takes them.

    Attributes:
        is_detector: It finds objects.
        model: In eval mode, on these devices, or on a GPU where there is one.
        predictor: The model on images.

    Raises:
        ConfigError: The model is no detector, and only those have classes to choose and tiles; or it has no such class.
        WorldError: There are no such devices.
        PiipError: The weights are absent, damaged, or do not fit.
    """

    def __init__(self, found: Trained, looking: Looking, devices: str | Sequence[str] | None = None) -> None:
        self.is_detector = row_of(found.config.task).finds_objects
        self._looking, found = looking, found.with_classes(class_names(found.config))
        self._labels = _labels(looking, found.config.data.classes, self.is_detector)
        apply_fp32_precision(found.config.train)
        spread_over = () if devices is None else named_devices(devices)
        self.model = found.load(device="cuda" if torch.cuda.is_available() else "cpu", spread_over=spread_over)
        self.predictor: Predictor = build_predictor(found.config, self.model, looking.threshold)

    def look(self, images: Sequence[Image]) -> list[Any]:
        """What is found in images, RGB uint8 (H, W, 3) each, and asked for."""
        if self._looking.tiling is None:
            return [self._kept(one) for one in self.predictor.predict_all(images)]
        from piip_scale.tasks.detection.tiling import predict_in_tiles

        tiling, size = self._looking.tiling, self._looking.batch_size
        look = self.predictor.predict_all
        return [self._kept(predict_in_tiles(look, pixels, tiling, size)) for pixels in images]

    def _kept(self, found: Any) -> Any:
        if not self.is_detector:
            return found
        keep = found.scores >= (self._looking.threshold or 0.0)
        return found.where(keep & torch.isin(found.labels, self._labels))


def _labels(looking: Looking, classes: Sequence[str], is_detector: bool) -> torch.Tensor:
    if not is_detector and (looking.classes or looking.tiling):
        raise ConfigError(
            "--classes" if looking.classes else "--tile",
            rule="it is for detectors, and the config is of another task",
            fix="leave it out",
        )
    if unknown := [name for name in looking.classes if name not in classes]:
        raise ConfigError("--classes", value=unknown[0], rule=f"the model's are {', '.join(classes)}")
    return torch.tensor([label for label, name in enumerate(classes) if name in (looking.classes or classes)])
