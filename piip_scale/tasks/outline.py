"""A run's model and its largest micro-batch without values, for planning, by the registry's rows."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from piip_scale.config.run import RunConfig
from piip_scale.models.counting import PartCount
from piip_scale.registry import row_of
from piip_scale.tasks.base import Outline
from piip_scale.tasks.counting import counting_of


def outline_run(
    config: RunConfig, num_classes: int, size_px: tuple[int, int] | None = None, device_type: str = "cuda"
) -> Outline:
    """The outline of a run, with the kernels that ``auto`` finds on its devices.

    Args:
        config: The run.
        num_classes: Classes without background.
        size_px: Height and width of the images; the largest that training can meet where ``None``.
        device_type: Of these devices.

    Raises:
        ConfigError: Heads that cannot be built as the config says.
    """
    config = config.model_copy(update={"model": config.model.model_copy(update=_kernels(config, device_type))})
    height, width = size_px or training_size_px(config)
    images_BCHW = torch.empty(config.data.micro_batch_size, 3, height, width, device="meta")
    with torch.device("meta"):
        outline: Outline = row_of(config.task).load("outline")(config, num_classes, images_BCHW, device_type)
    return replace(outline, counted=partial(_counted, config, num_classes, height, width))


def _kernels(config: RunConfig, device_type: str) -> dict[str, str]:
    on_gpu = device_type == "cuda"
    kernels = {"attention_kernel": "sdpa"}
    if config.model.fused_kernel == "auto":
        kernels["fused_kernel"] = "triton" if on_gpu else "plain"
    if config.model.deform_kernel == "auto":
        kernels["deform_kernel"] = "triton" if on_gpu and not config.train.deterministic else "reference"
    return kernels


def _counted(
    config: RunConfig, num_classes: int, height_px: int, width_px: int
) -> tuple[tuple[PartCount, ...], tuple[PartCount, ...]]:
    counting = counting_of(config, num_classes)
    network = counting.network(height_px, width_px, training=True)
    return network, counting.heads(height_px, width_px, training=True)


def training_size_px(config: RunConfig) -> tuple[int, int]:
    """Height and width of the largest micro-batch that a run can meet."""
    size_px: tuple[int, int] = row_of(config.task).load("training_size_px")(config)
    return size_px
