"""mmseg's heads on a PIIP network: the network, and one leaf that holds the heads."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from piip_scale.config.segmentation import InferenceConfig, SegmentationAugment, SegmentationRun, SegmentorConfig
from piip_scale.data.batch import SegmentationBatch
from piip_scale.errors import ConfigError, ModelError
from piip_scale.models.branch import FeatureSpec
from piip_scale.models.piip import PIIP
from piip_scale.tasks.base import Segmentation
from piip_scale.tasks.heads import Anchor, Heads, NetworkWithHeads, call_in_float32, quiet_mmengine
from piip_scale.tasks.mmlab import BaseModule, ConfigDict, DefaultScope
from piip_scale.tasks.pixels import network_input
from piip_scale.tasks.segmentation.heads_config import plan_segmentor
from piip_scale.tasks.segmentation.mmlab import MODELS, PixelData, SegDataSample
from piip_scale.tasks.segmentation.rank_norm import RankBatchNorm
from piip_scale.tasks.segmentation.sliding import class_scores, label_map

MODELS.register_module(module=RankBatchNorm)
_PREFIXES = {"decode_head": "decode", "auxiliary_head": "aux"}


def build_segmentation_model(
    config: SegmentationRun, num_classes: int, network_device: str | None = None
) -> SegmentationModel:
    """The initialised segmentor of a run, on torch's default device in float32.

    Args:
        config: The run.
        num_classes: Of the data set.
        network_device: Where the network is built, if elsewhere; ``meta`` leaves it without values.

    Raises:
        ConfigError: Overrides that mmseg does not know.
        KernelError: A kernel that the config names cannot be had.
    """
    with torch.device(network_device or torch.get_default_device()):
        backbone = PIIP(config.model)
    heads = SegmentationHeads(config.segmentor, backbone.feature_specs, num_classes)
    return SegmentationModel(backbone, heads, config.data.augment, config.segmentor.inference)


class SegmentationHeads(Heads):
    """Decode head and auxiliary head as one leaf: float32 inside, whatever the dtype of its weights.

    Their control flow does not depend on the data, so that every rank makes the same collective calls in their batch
    norms; as one leaf ZeRO-3 gathers them once.

    Args:
        config: Kind and overrides.
        features: What the network offers, largest map first.
        num_classes: Of the data set.

    Attributes:
        heads: mmseg's modules.
        loss_names: The names of what ``forward`` returned in training, known after the first call.

    Raises:
        ConfigError: Overrides that mmseg does not know.
    """

    def __init__(self, config: SegmentorConfig, features: Sequence[FeatureSpec], num_classes: int) -> None:
        super().__init__()
        self.heads = _build(plan_segmentor(config, features, num_classes))
        self.loss_names: tuple[str, ...] = ()
        self._built_of = config, tuple(features)

    def for_classes(self, num_classes: int) -> SegmentationHeads:
        """See ``Heads.for_classes``."""
        return SegmentationHeads(*self._built_of, num_classes)

    def forward(self, *features: Tensor, labels_BHW: Tensor | None = None) -> tuple[Tensor, ...] | Tensor:
        """Losses in training, class scores otherwise.

        Args:
            features: The network's maps, (B, C, H, W) each.
            labels_BHW: uint8, in training.

        Returns:
            In training float32 scalars named by ``loss_names``, each connected to every feature. Otherwise float32
            scores (B, num_classes, H, W) as large as the largest map.
        """
        with torch.autocast(features[0].device.type, enabled=False):
            singles = tuple(feature.float() for feature in features)
            if not self.training:
                scores: Tensor = call_in_float32(self.heads, singles, labels_BHW)
                return scores
            anchor = Anchor()
            taken = anchor.take(singles)
            losses = call_in_float32(self.heads, taken, labels_BHW)
            self.loss_names = tuple(losses)
            return anchor.tie(list(losses.values()), taken)


class SegmentationModel(NetworkWithHeads):
    """A PIIP network with mmseg's heads: a ``TrainableModel``.

    Args:
        backbone: The network.
        heads: The heads for its features.
        augment: Holds the normalisation of images.
        inference: How images are segmented in eval mode.
    """

    def __init__(
        self, backbone: PIIP, heads: SegmentationHeads, augment: SegmentationAugment, inference: InferenceConfig
    ) -> None:
        super().__init__(backbone, heads)
        self.heads: SegmentationHeads = heads
        self._mean, self._std, self._inference = augment.mean, augment.std, inference
        backbone.take_images_of(augment.mean, augment.std)
        self._pad_multiple_px = augment.pad_multiple_px

    def forward(self, batch: SegmentationBatch) -> dict[str, Tensor]:
        """Named losses and pixel accuracies (0-100), float32 scalars.

        Raises:
            ModelError: The model is in eval mode.
        """
        if not self.training:
            raise ModelError("losses need training mode", fix="call model.train() first, or predict")
        features = self.backbone(network_input(batch, self._mean, self._std))
        losses = self.heads(*features, labels_BHW=batch.labels_BHW)
        return dict(zip(self.heads.loss_names, losses, strict=True))

    @torch.no_grad()
    def predict(self, batch: SegmentationBatch) -> list[Segmentation]:
        """The class of every pixel of the stored images, on the CPU.

        Collective where ranks are connected: each makes as many calls of the network as the rank whose images need
        most. Images of several sizes are several calls, since an image's scores must not depend on its batch.

        Raises:
            ModelError: The model is in training mode.
        """
        if self.training:
            raise ModelError("predict needs eval mode", fix="call model.eval() first")
        return [
            Segmentation(info.image_id, label_map(one, info.original_size_px))
            for one, info in zip(self.scores(batch), batch.infos, strict=True)
        ]

    def scores(self, batch: SegmentationBatch) -> list[Tensor]:
        """The classes' scores of each image in the network's size, float32 (num_classes, H, W); see ``predict``."""
        pixels = network_input(batch, self._mean, self._std)
        sizes_px = [info.size_px for info in batch.infos]
        return class_scores(self._scores, pixels, sizes_px, self._inference, self._pad_multiple_px)

    not_static = ""

    def static_outputs(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        """See ``NetworkWithHeads.static_outputs``: the classes' scores, float32 (B, num_classes, H, W)."""
        # Not by the leaf's own call, whose casts of weights no exporter follows.
        return {"scores": self._as_large(self.heads.heads(self.backbone(images_BCHW), None), images_BCHW)}

    def _scores(self, pixels: Tensor) -> Tensor:
        return self._as_large(self.heads(*self.backbone(pixels)), pixels)

    @staticmethod
    def _as_large(scores: Tensor, pixels: Tensor) -> Tensor:
        return nn.functional.interpolate(scores, pixels.shape[2:], mode="bilinear", align_corners=False)


class _Heads(BaseModule):
    """Decode head and perhaps auxiliary head, as mmseg's ``EncoderDecoder`` calls them."""

    def __init__(self, heads: dict[str, BaseModule]) -> None:
        super().__init__()
        for name, head in heads.items():
            self.add_module(name, head)

    def forward(self, features: tuple[Tensor, ...], labels_BHW: Tensor | None) -> dict[str, Tensor] | Tensor:
        """Losses by name where there are labels, else the decode head's scores."""
        if labels_BHW is None:
            scores: Tensor = self.decode_head(features)
            return scores
        samples = [SegDataSample(gt_sem_seg=PixelData(data=labels[None])) for labels in labels_BHW.long()]
        losses: dict[str, Tensor] = {}
        for name, head in self.named_children():
            found: dict[str, Any] = head.loss_by_feat(head(features), samples)  # type: ignore[operator]
            losses |= {f"{_PREFIXES[name]}.{key}": value.float().mean() for key, value in found.items()}
        return losses


def _build(plan: dict[str, Any]) -> _Heads:
    try:
        with DefaultScope.overwrite_default_scope("mmseg"), warnings.catch_warnings():
            # About its own builder, and about the released recipes' default of averaging over ignored pixels too.
            warnings.filterwarnings("ignore", message=r"``build_loss`` would be deprecated|Default ``avg_non_ignore``")
            heads = _Heads({name: MODELS.build(ConfigDict(head)) for name, head in plan.items()})
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            "mmseg cannot build the heads", value=f"{type(error).__name__}: {error}", fix="check segmentor.overrides"
        ) from error
    if not any(parameter.is_meta for parameter in heads.parameters()):
        with quiet_mmengine():
            heads.init_weights()
    return heads
