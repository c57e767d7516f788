"""The interface between a task (model, targets, metric) and the engine that trains it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from piip_scale.config.run import RunConfig
from piip_scale.data.batch import Batch
from piip_scale.models.class_layers import ClassLayer
from piip_scale.models.counting import PartCount
from piip_scale.models.rules import ParameterRule
from piip_scale.models.saved_activations import HeadBytes

if TYPE_CHECKING:
    import PIL.Image

    from piip_scale.data.images import Image
    from piip_scale.tasks.drawing import DrawingStyle
    from piip_scale.tasks.report import Report

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""By the config key ``train.precision``."""

__all__ = [
    "DTYPES",
    "Detections",
    "Metric",
    "Outline",
    "ParameterRule",
    "Predictor",
    "Segmentation",
    "Task",
    "TrainableModel",
]


@dataclass(frozen=True)
class Detections:
    """What a detector found in one image, in pixels of the stored image, best first.

    Attributes:
        image_id: The image's id in the COCO file.
        boxes_xyxy_px: float32 (N, 4).
        scores: float32 (N,).
        labels: int64 (N,).
        masks_rle: One COCO run-length dict (``size``, ``counts``) per object; ``None`` for a detector without masks.
    """

    image_id: int
    boxes_xyxy_px: Tensor
    scores: Tensor
    labels: Tensor
    masks_rle: list[dict[str, object]] | None = None

    def where(self, keep: Tensor) -> Detections:
        """Those of ``keep``, bool (N,)."""
        masks = self.masks_rle
        return replace(
            self,
            boxes_xyxy_px=self.boxes_xyxy_px[keep],
            scores=self.scores[keep],
            labels=self.labels[keep],
            masks_rle=None if masks is None else [masks[index] for index in keep.nonzero().flatten().tolist()],
        )


@dataclass(frozen=True)
class Segmentation:
    """The class of every pixel of one stored image.

    Attributes:
        image_id: The image's id in its set.
        labels_HW: uint8, on the CPU.
    """

    image_id: int
    labels_HW: Tensor


class TrainableModel(Protocol):
    """A model the engine can train: an ``nn.Module`` with these methods.

    ``model(batch)`` in training mode returns named scalar losses, float32; those whose name holds ``loss`` are
    summed by the engine.
    """

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """Named losses of one micro-batch."""
        ...

    def predict(self, batch: Batch) -> Sequence[Any]:
        """What the task finds in every image of the batch, in eval mode and without gradients."""
        ...

    def heads_module(self) -> nn.Module:
        """Neck and heads as one module, which ZeRO-3 gathers whole because their control flow depends on the data.

        Its ``forward`` takes the features as separate tensors and returns a tensor or a tuple of tensors, never a
        dict, and every output depends on the features: torch calls the module's backward hook, where ZeRO-3 reduces
        the leaf's gradients, on no other terms. The engine refuses a leaf that returns anything else in training.
        In each step it returns as many tensors on every rank, or ranks part: losses that may be absent on some go
        into one tensor.
        """
        ...

    def parts(self) -> dict[str, nn.Module]:
        """Disjoint named modules: the branches, largest first, then interactions, merging and heads.

        The start report counts by them; the first one's matrices set the automatic persistence threshold.
        """
        ...

    def call_order(self) -> list[list[nn.Module]]:
        """All that holds parameters, in the order of calls: the modules of an entry compute on one device."""
        ...

    def parameter_rules(self) -> dict[str, ParameterRule]:
        """The rule of every parameter, by its name in ``named_parameters()``."""
        ...

    def class_layers(self) -> dict[str, ClassLayer]:
        """What follows from the number of classes, by its name in the state dict: other classes make it useless."""
        ...

    @property
    def num_layers(self) -> int:
        """Depth of the deepest branch, the scale of ``ParameterRule.layer_id``."""
        ...

    def set_precision(self, dtype: torch.dtype) -> None:
        """Dtype of branches, interactions and merging; neck, heads and losses stay float32."""
        ...


class Watched(Protocol):
    """The few validation images that every evaluation of a training shows; one instance per rank and evaluation."""

    def keep(self, predictions: Sequence[Any]) -> None:
        """Keeps what of one batch's predictions is of these images."""
        ...

    def pictures(self) -> Mapping[str, bytes]:
        """Truth beside prediction as JPEG files, by sample, on rank 0; nothing elsewhere. Collective."""
        ...


class Metric(Protocol):
    """Collects predictions over a validation set; one instance per rank and evaluation."""

    def update(self, batch: Any, predictions: Sequence[Any]) -> None:
        """Adds one batch and what the model's ``predict`` returned for it."""
        ...

    def compute(self) -> dict[str, float]:
        """The metrics over all ranks. Collective: every rank calls it; the result is the same on all."""
        ...

    def pr_curves(self) -> Mapping[str, npt.NDArray[np.float64]]:
        """Precision and recall by score of what is scored, on rank 0 after ``compute``; nothing elsewhere.

        By name, float64 (5, T) of T rising scores from 0 to 1: right and wrong predictions, objects missed, precision
        and recall.
        """
        ...

    def report(self) -> Report | None:
        """Tables and pictures of each class, on rank 0 after ``compute``; ``None`` elsewhere. Collective."""
        ...

    def write_results(self, path: Path) -> None:
        """Writes what was found in every image as JSON, whole or not at all. Collective; rank 0 writes."""
        ...


def _nothing_counted() -> tuple[tuple[PartCount, ...], tuple[PartCount, ...]]:
    return (), ()


@dataclass(frozen=True)
class Outline:
    """What planning a run's memory and time needs of its task, on the meta device: shapes without values.

    Attributes:
        model: The ``TrainableModel``, in training mode and in the run's precision.
        network: The part of it that ``run`` calls.
        parts: ``TrainableModel.parts()``.
        heads: Name of the part that holds the heads.
        run: Calls the network on one micro-batch of the largest images; returns the features that heads take.
        head_bytes: Estimates from these features what neck and heads hold for their backward pass, and in it.
        counted: Counts what the network, and what neck and heads compute for one of its images in a training step.
    """

    model: nn.Module
    network: nn.Module
    parts: Mapping[str, nn.Module]
    heads: str
    run: Callable[[], Sequence[Tensor]]
    head_bytes: Callable[[Sequence[Tensor]], HeadBytes]
    counted: Callable[[], tuple[tuple[PartCount, ...], tuple[PartCount, ...]]] = _nothing_counted


class Task(Protocol):
    """Everything the engine needs to know of what it trains."""

    def build_model(self) -> nn.Module:
        """The model, a ``TrainableModel``, in float32: its network on the meta device, everything else initialised.

        The engine draws the network's parameters or reads them from the files its config names, under ZeRO-3 each rank
        only what it keeps.
        """
        ...

    def train_batches(self, epoch: int, first_step: int) -> Iterable[Batch]:
        """This rank's micro-batches of one epoch from micro-step ``first_step`` on; equally many on every rank."""
        ...

    def train_keys(self, epoch: int, micro_steps: Iterable[int]) -> list[list[str]]:
        """The keys of the samples that ``train_batches`` asks for, by micro-batch of this rank; loads none of them."""
        ...

    def check(self) -> None:
        """Raises a ``PiipError`` for what would go wrong at the start of a training; takes no model's memory."""
        ...

    def num_train_batches(self) -> int:
        """Micro-batches of one epoch, the same on every rank."""
        ...

    def data_id(self) -> str:
        """What identifies the sets of this run, whatever their location."""
        ...

    def num_broken_samples(self) -> int:
        """Training samples that this rank had to replace since it started."""
        ...

    def val_batches(self) -> Iterable[Batch]:
        """This rank's share of the validation set; equally many batches on every rank (the tail repeats samples)."""
        ...

    def num_val_batches(self) -> int:
        """Batches of ``val_batches``, the same on every rank."""
        ...

    def own_val_batches(self) -> Iterable[Batch]:
        """This rank's batches of the validation set, each image in one batch of one rank; broken ones are left out."""
        ...

    def num_own_val_batches(self) -> int:
        """Batches of ``own_val_batches``."""
        ...

    def num_val_samples(self) -> int:
        """Images of the validation set."""
        ...

    def num_broken_val_samples(self) -> int:
        """Validation samples that this rank had to replace or leave out."""
        ...

    def build_metric(self) -> Metric:
        """A fresh metric."""
        ...

    def watched(self) -> Watched:
        """A fresh collection of what is found in the images that ``telemetry.pictures`` names."""
        ...

    def outline(self, config: RunConfig, device_type: str = "cuda") -> Outline:
        """What planning needs to know of a run that differs from this task's in its network or batch only.

        Args:
            config: The run.
            device_type: Of the devices that it is planned for.
        """
        ...

    def network_flops(self, height_px: int, width_px: int) -> int:
        """Model FLOPs of one image of this size in a training step, heads left out: what MFU is measured by."""
        ...


class Predictor(Protocol):
    """A trained model on single images: what it finds, drawn for people and written down for programs.

    Attributes:
        classes: Names in label order.
    """

    classes: tuple[str, ...]

    def predict(self, pixels: Image, number: int) -> Any:
        """What the model finds in an image, RGB uint8 (H, W, 3); ``number`` is what the image is called."""
        ...

    def predict_all(self, images: Sequence[Image], first_number: int = 1) -> list[Any]:
        """What it finds in several images, as one by one; ``first_number`` and those after it are their names."""
        ...

    def draw(self, pixels: Image, found: Any, style: DrawingStyle | None = None) -> PIL.Image.Image:
        """The image with what was found drawn on it; ``style`` is that of a sheet where ``None``."""
        ...

    def entry(self, found: Any) -> dict[str, Any]:
        """What was found as values for JSON."""
        ...

    def rows(self, found: Any) -> list[dict[str, Any]]:
        """What was found as flat rows of a table, all with the same columns."""
        ...

    def summary(self, found: Any) -> str:
        """What was found, in a few words."""
        ...
