"""The pyramid network as a classifier that can be trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from piip_scale.config.classification import ClassificationRun
from piip_scale.config.model import ClassifierConfig
from piip_scale.data.batch import ClassificationBatch, ImageInfo
from piip_scale.errors import ModelError
from piip_scale.models.class_layers import ClassLayer
from piip_scale.models.classifier import PiipClassifier
from piip_scale.tasks.pixels import network_input

NUM_BEST = 5
"""Classes that a prediction names at most."""


@dataclass(frozen=True)
class Classification:
    """What a classifier takes an image for, best first.

    Attributes:
        image_id: The image's number in its set.
        labels: int64 (N,), N the lesser of ``NUM_BEST`` and the classes there are.
        probabilities: float32 (N,).
    """

    image_id: int
    labels: Tensor
    probabilities: Tensor


def best_classes(logits_BK: Tensor, infos: Sequence[ImageInfo]) -> list[Classification]:
    """The best classes by logits (B, K) of so many images, on the CPU."""
    best_BN, labels_BN = logits_BK.softmax(1).topk(min(NUM_BEST, logits_BK.shape[1]))
    return [
        Classification(info.image_id, labels, values)
        for info, labels, values in zip(infos, labels_BN.cpu(), best_BN.cpu(), strict=True)
    ]


def build_classification_model(
    config: ClassificationRun, num_classes: int, network_device: str | None = None
) -> ClassificationModel:
    """The initialised classifier of a run, on torch's default device in float32.

    Args:
        config: The run.
        num_classes: Classes.
        network_device: Where it is built, if elsewhere; ``meta`` leaves it without values.

    Raises:
        KernelError: A kernel that the config names cannot be had.
    """
    with torch.device(network_device or torch.get_default_device()):
        return ClassificationModel(config, num_classes)


class ClassificationModel(PiipClassifier):
    """A ``PiipClassifier`` on batches: a ``TrainableModel``.

    It adds no parameters, so that imported weights of a released classifier, and those converted from a run, have the
    same names.

    Args:
        config: The run.
        num_classes: Classes.
    """

    def __init__(self, config: ClassificationRun, num_classes: int) -> None:
        super().__init__(config.model, ClassifierConfig(num_classes=num_classes, separate=config.classifier.separate))
        self._mean, self._std = config.data.augment.mean, config.data.augment.std
        self.take_images_of(self._mean, self._std)
        self._label_smoothing = config.classifier.label_smoothing

    def forward(self, batch: ClassificationBatch) -> dict[str, Tensor]:  # type: ignore[override]  # engines pass batches
        """``loss_cls``, the cross-entropy, a float32 scalar.

        Raises:
            ModelError: The model is in eval mode.
        """
        if not self.training:
            raise ModelError("losses need training mode", fix="call model.train() first, or predict")
        logits_BK = self.logits(network_input(batch, self._mean, self._std))
        if batch.soft_labels_BK is not None:
            return {"loss_cls": functional.cross_entropy(logits_BK, batch.soft_labels_BK)}
        smoothing = self._label_smoothing
        return {"loss_cls": functional.cross_entropy(logits_BK, batch.labels, label_smoothing=smoothing)}

    @torch.no_grad()
    def predict(self, batch: ClassificationBatch) -> list[Classification]:
        """The best classes of every image, on the CPU.

        Raises:
            ModelError: The model is in training mode.
        """
        if self.training:
            raise ModelError("predict needs eval mode", fix="call model.eval() first")
        return best_classes(self.batch_logits(batch), batch.infos)

    def batch_logits(self, batch: ClassificationBatch) -> Tensor:
        """The classes' logits of each image, float32 (B, K)."""
        return self.logits(network_input(batch, self._mean, self._std))

    not_static = ""

    def static_outputs(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        """See ``NetworkWithHeads.static_outputs``: the logits, float32 (B, K)."""
        return {"logits": self.logits(images_BCHW)}

    def heads_module(self) -> nn.Module:
        """The head."""
        return self.head

    def parts(self) -> dict[str, nn.Module]:
        """Branches, largest first, then the interactions, and the head."""
        branches = {f"branch {index}": branch for index, branch in enumerate(self.branches)}
        return branches | {"interactions": self.interactions, "heads": self.head}

    def class_layers(self) -> dict[str, ClassLayer]:
        """The linear layers of the head: a row a class, and nothing else."""
        names = [name for name in self.state_dict() if name.startswith("head.") and ".linear." in name]
        return dict.fromkeys(names, ClassLayer(axis=0, each=1, others=0))

    def set_precision(self, dtype: torch.dtype) -> None:
        """Dtype of branches and interactions; the head stays float32."""
        self.branches.to(dtype)
        self.interactions.to(dtype)
