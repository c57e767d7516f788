"""A run's model and its largest micro-batch without values, for planning; a new task is entered here."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from piip_scale.config.classification import ClassificationRun
from piip_scale.config.detection import AugmentConfig, DetectionRun
from piip_scale.config.run import RunConfig
from piip_scale.config.segmentation import SegmentationRun
from piip_scale.errors import ConfigError
from piip_scale.tasks.base import Outline
from piip_scale.tasks.classification.model import build_classification_model
from piip_scale.tasks.saved_activations import saved_for_backward

_FLOAT_BYTES = 4
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def outline_run(config: RunConfig, num_classes: int, size_px: tuple[int, int] | None = None) -> Outline:
    """The outline of a run on GPUs, with the kernels that ``auto`` finds there.

    Args:
        config: The run.
        num_classes: Classes without background.
        size_px: Height and width of the images; the largest that training can meet where ``None``.

    Raises:
        ConfigError: Heads that cannot be built as the config says, or a task that has no rule here.
    """
    kernels = {"attention_kernel": "sdpa"}
    if config.model.deform_kernel == "auto":
        kernels["deform_kernel"] = "triton"
    config = config.model_copy(update={"model": config.model.model_copy(update=kernels)})
    height, width = size_px or training_size_px(config)
    images_BCHW = torch.empty(config.data.micro_batch_size, 3, height, width, device="meta")
    with torch.device("meta"):
        if isinstance(config, ClassificationRun):
            return _of_classifier(config, num_classes, images_BCHW)
        if isinstance(config, DetectionRun):
            return _of_detector(config, num_classes, images_BCHW)
        if isinstance(config, SegmentationRun):
            return _of_segmentor(config, num_classes, images_BCHW)
    raise _unknown(config)


def _of_detector(config: DetectionRun, num_classes: int, images_BCHW: Tensor) -> Outline:
    from piip_scale.tasks.detection.memory import head_bytes
    from piip_scale.tasks.detection.model import build_detection_model  # mmdet takes seconds to import

    model = build_detection_model(config, num_classes).train()
    model.set_precision(_DTYPES[config.train.precision])
    run, heads = partial(model.backbone, images_BCHW), partial(head_bytes, model.heads)
    return Outline(model, model.backbone, model.parts(), "heads", run, heads)


def _of_classifier(config: ClassificationRun, num_classes: int, images_BCHW: Tensor) -> Outline:
    model = build_classification_model(config, num_classes).train()
    model.set_precision(_DTYPES[config.train.precision])

    def run() -> tuple[Tensor, ...]:
        *_, states = model.walk(images_BCHW)
        return tuple(state.grid_BHWC for state in states)

    def head_bytes(features: Sequence[Tensor]) -> int:
        # A head of each branch reads one token; the common one brings all of them to one width in float32.
        return 0 if config.classifier.separate else sum(_FLOAT_BYTES * feature.numel() for feature in features)

    return Outline(model, model, model.parts(), "heads", run, head_bytes)


def _of_segmentor(config: SegmentationRun, num_classes: int, images_BCHW: Tensor) -> Outline:
    from piip_scale.tasks.segmentation.model import build_segmentation_model  # mmseg takes seconds to import

    model = build_segmentation_model(config, num_classes).train()
    model.set_precision(_DTYPES[config.train.precision])

    def head_bytes(features: Sequence[Tensor]) -> int:
        # In eval mode batch norms keep as much and ask no other rank. The loss resizes scores to the labels' size,
        # and keeps them before and after the softmax.
        heads = model.heads.heads.eval()
        kept = sum(saved_for_backward(head, tuple(features))[1] for head in heads.children())
        scores = len(list(heads.children())) * num_classes * images_BCHW[:, 0].numel()
        return kept + 2 * _FLOAT_BYTES * scores

    return Outline(model, model.backbone, model.parts(), "heads", partial(model.backbone, images_BCHW), head_bytes)


def training_size_px(config: RunConfig) -> tuple[int, int]:
    """Height and width of the largest micro-batch that a run can meet.

    Raises:
        ConfigError: A task that has no rule here.
    """
    if isinstance(config, ClassificationRun):
        return (config.model.branches[-1].resolution_px,) * 2
    if isinstance(config, DetectionRun):
        return largest_canvas_px(config.data.augment, config.data.micro_batch_size)
    if isinstance(config, SegmentationRun):
        return config.data.augment.crop_px
    raise _unknown(config)


def _unknown(config: RunConfig) -> ConfigError:
    return ConfigError("config key task", value=config.task, rule="no rule tells its images and heads")


def largest_canvas_px(augment: AugmentConfig, num_images: int) -> tuple[int, int]:
    """Height and width of the largest canvas that training can meet.

    One image is at most as long and as short as the config lets it be; of several, one may lie and another stand.
    """
    long, crop = augment.max_edge_px, augment.crop_px
    sides = (long if num_images > 1 else min(max(augment.short_edge_px), long), long)
    if crop is not None:
        sides = crop if augment.jitter_scale else (min(sides[0], crop[0]), min(sides[1], crop[1]))
    height, width = (-(-side // augment.pad_multiple_px) * augment.pad_multiple_px for side in sides)
    return height, width
