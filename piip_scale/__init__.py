"""piip_scale: train, convert, evaluate and serve Parameter-Inverted Image Pyramid detectors."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from piip_scale.serving.model import Model

__version__ = "0.1.0"


def load(
    source: str | Path,
    weights: str | Path | None = None,
    *,
    threshold: float = 0.5,
    devices: str | Sequence[str] | None = None,
) -> Model:
    """A trained model that looks at images: ``piip_scale.load("model").predict("photo.jpg").objects``.

    Args:
        source: A folder that ``piip-scale export`` wrote, a run's directory, or a config file.
        weights: A ``.safetensors`` file, a folder of them, or a checkpoint; of a run its newest one where ``None``.
        threshold: Objects of a lesser score are left out.
        devices: Have parts of the model each, where one is too small for it: ``["cuda:0", "cuda:1"]``, with ``cpu``
            among them if need be, or ``"all"`` GPUs; ``None`` puts it on one GPU, or on the CPU where there is none.

    Raises:
        WorldError: There are no such devices.
        PiipError: Config or weights are absent, damaged, or do not fit.
    """
    # Not at the top: torch takes seconds, and who asks for the version need not wait for it.
    from piip_scale.serving.model import Model

    return Model(source, weights, threshold, devices)
