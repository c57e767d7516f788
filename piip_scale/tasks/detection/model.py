"""mmdet's detectors on a PIIP network: the network, and one leaf that holds neck and heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from piip_scale.config.detection import AugmentConfig, DetectionRun, DetectorConfig
from piip_scale.data.batch import DetectionBatch
from piip_scale.errors import ConfigError, ModelError
from piip_scale.models.branch import FeatureSpec
from piip_scale.models.piip import PIIP
from piip_scale.tasks.base import Detections
from piip_scale.tasks.detection.heads_config import DetectorPlan, plan_detector
from piip_scale.tasks.detection.mask_results import encode_when_pasted
from piip_scale.tasks.detection.samples import data_samples, detections
from piip_scale.tasks.heads import Anchor, Heads, NetworkWithHeads, call_in_float32, quiet_mmengine
from piip_scale.tasks.mmlab import MODELS, BaseModule, ConfigDict, DefaultScope, DetDataSample
from piip_scale.tasks.pixels import network_input

Prediction = dict[str, Any]


def build_detection_model(config: DetectionRun, num_classes: int, network_device: str | None = None) -> DetectionModel:
    """The initialised detector of a run, on torch's default device in float32.

    Args:
        config: The run.
        num_classes: Classes without background.
        network_device: Where the network is built, if elsewhere; ``meta`` leaves it without values.

    Raises:
        ConfigError: Overrides that mmdet does not know, or features that the detector cannot take.
        KernelError: A kernel that the config names cannot be had.
    """
    with torch.device(network_device or torch.get_default_device()):
        backbone = PIIP(config.model)
    heads = DetectionHeads(config.detector, backbone.feature_specs, num_classes)
    return DetectionModel(backbone, heads, config.data.augment)


class DetectionHeads(Heads):
    """Neck and heads as one leaf: float32 inside, whatever the dtype of its weights.

    ZeRO-3 follows every module call and compares ranks; what mmdet's heads call depends on the data. As one leaf, whose
    inputs and outputs are tensors, they are one call.

    Args:
        config: Kind and overrides.
        features: What the network offers, largest map first.
        num_classes: Classes without background.

    Attributes:
        loss_names: The names of the losses that ``forward`` last returned in training.

    Raises:
        ConfigError: Overrides that mmdet does not know, or features that the detector cannot take.
    """

    def __init__(self, config: DetectorConfig, features: Sequence[FeatureSpec], num_classes: int) -> None:
        super().__init__()
        plan = plan_detector(config, features, num_classes)
        self.feature_indices, self.has_masks = plan.feature_indices, plan.has_masks
        self.detector = _build(plan)
        encode_when_pasted(self.detector)
        self.loss_names: tuple[str, ...] = ()
        self._built_of = config, tuple(features)

    def for_classes(self, num_classes: int) -> DetectionHeads:
        """See ``Heads.for_classes``."""
        return DetectionHeads(*self._built_of, num_classes)

    def forward(self, *features: Tensor, samples: list[DetDataSample]) -> Tensor | list[Prediction]:
        """Losses in training, predictions otherwise.

        Args:
            features: The network's maps, (B, C, H, W) each.
            samples: One per image, with sizes and, in training, objects.

        Returns:
            In training one float32 tensor, the losses that ``loss_names`` names, connected to every feature: ZeRO-3
            counts a leaf's outputs, and ranks whose losses differ in number must not differ in that. Otherwise a dict
            of ``bboxes`` (N, 4) in px of the stored image, ``scores``, ``labels`` and perhaps
            ``masks`` as run lengths, per image.
        """
        with torch.autocast(features[0].device.type, enabled=False):
            if not self.training:
                return [_prediction(sample) for sample in self._run(features, samples, "predict")]
            anchor = Anchor()
            taken = anchor.take(features)
            losses = _scalars(self._run(taken, samples, "loss"))
            self.loss_names = tuple(losses)
            (tied,) = anchor.tie([torch.stack(list(losses.values()))], taken)
            return tied

    def _run(self, features: Sequence[Tensor], samples: list[DetDataSample], mode: str) -> Any:
        taken = tuple(features[index].float() for index in self.feature_indices)
        self._check_queries(taken)
        return call_in_float32(self.detector, taken, samples, mode=mode)

    def _check_queries(self, features: Sequence[Tensor]) -> None:
        """DETR-like heads draw their queries from the cells of all levels, those the neck adds included."""
        num_queries = getattr(self.detector, "num_queries", 0)
        sizes = [feature.shape[2:] for feature in features]
        for _ in range(getattr(self.detector, "num_feature_levels", 0) - len(sizes)):
            sizes.append(torch.Size(-(-side // 2) for side in sizes[-1]))
        num_cells = sum(size.numel() for size in sizes)
        if num_cells < num_queries:
            raise ConfigError(
                "images are too small for the detector's queries",
                value=f"{num_cells} cells",
                rule=f"num_queries={num_queries} are drawn from them",
                fix="lower detector.overrides.num_queries (and test_cfg.max_per_img), or use larger images",
            )


class DetectionModel(NetworkWithHeads):
    """A PIIP network with mmdet's neck and heads: a ``TrainableModel``.

    Args:
        backbone: The network.
        heads: Neck and heads for its features.
        augment: Holds the normalisation of images.
    """

    def __init__(self, backbone: PIIP, heads: DetectionHeads, augment: AugmentConfig) -> None:
        super().__init__(backbone, heads)
        self.heads: DetectionHeads = heads
        self._mean, self._std = augment.mean, augment.std
        backbone.take_images_of(augment.mean, augment.std)

    def forward(self, batch: DetectionBatch) -> dict[str, Tensor]:
        """Named losses, float32 scalars.

        Raises:
            ModelError: The model is in eval mode.
            DataError: The detector trains on masks and the batch has none.
        """
        if not self.training:
            raise ModelError("losses need training mode", fix="call model.train() first, or predict")
        losses = self._run(batch, with_masks=self.heads.has_masks)
        return dict(zip(self.heads.loss_names, losses, strict=True))

    @torch.no_grad()
    def predict(self, batch: DetectionBatch) -> list[Detections]:
        """Detections of every image, in pixels of the stored image, on the CPU.

        Raises:
            ModelError: The model is in training mode.
        """
        if self.training:
            raise ModelError("predict needs eval mode", fix="call model.eval() first")
        predictions = self._run(batch, with_masks=False)
        return [detections(found, info) for found, info in zip(predictions, batch.infos, strict=True)]

    def _run(self, batch: DetectionBatch, with_masks: bool) -> Any:
        # Before the network is launched: what waits for the device here has little to wait for.
        samples = data_samples(batch, with_masks)
        return self.heads(*self.backbone(network_input(batch, self._mean, self._std)), samples=samples)


@MODELS.register_module()
class PassThroughBackbone(BaseModule):
    """Stands where mmdet expects a backbone: its "images" are the features already."""

    def forward(self, features: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The features, as they come."""
        return features


def _build(plan: DetectorPlan) -> BaseModule:
    try:
        with DefaultScope.overwrite_default_scope("mmdet"):
            detector: BaseModule = MODELS.build(ConfigDict(plan.model))
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            "mmdet cannot build the detector", value=f"{type(error).__name__}: {error}", fix="check detector.overrides"
        ) from error
    # mmengine keeps means of what it initialised, which the meta device has not; there, weights are yet to come.
    if not any(parameter.is_meta for parameter in detector.parameters()):
        with quiet_mmengine():
            detector.init_weights()
    return detector


def _scalars(losses: dict[str, Tensor | list[Tensor]]) -> dict[str, Tensor]:
    """Mmdet's losses, some of them lists over levels, as one float32 scalar each."""
    return {
        name: sum((item.float().mean() for item in value), torch.zeros((), device=value[0].device))
        if isinstance(value, list | tuple)
        else value.float().mean()
        for name, value in losses.items()
    }


def _prediction(sample: DetDataSample) -> Prediction:
    found = sample.pred_instances
    return {name: found[name] for name in ("bboxes", "scores", "labels", "masks") if name in found}
