"""How many parameters a network has and how many multiply-accumulates an image costs, part by part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from piip_scale.config.model import ClassifierConfig, PiipConfig
from piip_scale.models.branch import FeatureSpec
from piip_scale.models.classifier import PiipClassifier
from piip_scale.models.network_work import AS_COMPUTED, Convention, NetworkWork
from piip_scale.models.piip import PIIP
from piip_scale.models.trunk import Trunk
from piip_scale.models.work import NOTHING, Work, total


@dataclass(frozen=True)
class PartCount:
    """A part of a network.

    Attributes:
        name: ``branch 0`` (the largest model) ..., ``interaction 0`` ..., ``merging``, ``pyramid``, or what follows it.
        parameters: Parameters.
        macs: Multiply-accumulates of one image in linear layers, convolutions and products of attention.
        sampling_macs: Those of deformable attention's sampling, which torch's counter does not see: for each query and
            point, 5 for each channel of the values (four corners and the attention's weight).
        note: What the count takes for granted.
        backward_macs: Of the backward pass of a training, by the rule of ``models.work``; 0 in a count of evaluation.
    """

    name: str
    parameters: int
    macs: int
    sampling_macs: int = 0
    note: str = ""
    backward_macs: int = 0

    @property
    def total_macs(self) -> int:
        """All multiply-accumulates of one image, forward."""
        return self.macs + self.sampling_macs

    @property
    def training_flops(self) -> int:
        """Model FLOPs of one image in a training step."""
        return Work(self.total_macs, self.backward_macs).training_flops


def part_count(
    name: str, module: nn.Module, work: Work, sampling: Work = NOTHING, note: str = "", *, training: bool = False
) -> PartCount:
    """A part from its module and what that computes, backward too where a training is counted."""
    backward = work.backward + sampling.backward if training else 0
    return PartCount(name, num_parameters(module), work.forward, sampling.forward, note, backward)


def count_network(
    config: PiipConfig,
    height_px: int,
    width_px: int,
    head: ClassifierConfig | None = None,
    convention: Convention = AS_COMPUTED,
    training_batch: int | None = None,
) -> tuple[PartCount, ...]:
    """Counts a network for one image.

    Args:
        config: The network.
        height_px: Height of its input, at the last branch's resolution.
        width_px: Width likewise.
        head: Counts the classifier with this head instead of the feature pyramid.
        convention: What to include.
        training_batch: Counts a training step, backward too, of a micro-batch of so many images; else an evaluation.

    Returns:
        Branches, interactions, merging (of more than one branch without separate heads), then pyramid or head.
    """
    model = _build(config, head)
    work = NetworkWork(config, height_px, width_px, convention, training_batch)
    training = training_batch is not None
    parts = [
        part_count(f"branch {index}", module, work.branch(index), training=training)
        for index, module in enumerate(model.branches)
    ]
    for stage, units in enumerate(model.interactions):
        if len(config.branches) > 1:
            parts.append(part_count(f"interaction {stage}", units, *work.stage(stage), training=training))
    return (*parts, *_rest(model, work, training))


def recomputed_macs(config: PiipConfig, parts: Sequence[PartCount]) -> tuple[int, ...]:
    """Multiply-accumulates of one image that each part computes a second time, in the backward pass of a training.

    Args:
        config: The network.
        parts: Its count as ``count_network`` gives it; a part without a backward pass computes nothing again.
    """
    again = [bool(branch.checkpoint_blocks) for branch in config.branches]
    rest = parts[len(again) :]
    again += [config.interaction.checkpoint_units and part.name.startswith("interaction") for part in rest]
    return tuple(
        part.total_macs if is_again and part.backward_macs else 0 for part, is_again in zip(parts, again, strict=True)
    )


def feature_maps(config: PiipConfig, height_px: int, width_px: int) -> tuple[tuple[FeatureSpec, Tensor], ...]:
    """What the network hands to a neck: each map's spec, and the map of one image on the meta device.

    A map has a gradient where training gives it one.
    """
    model = _build(config, None)
    assert isinstance(model, PIIP)
    work = NetworkWork(config, height_px, width_px, AS_COMPUTED, None)
    features = []
    geometry = model.geometry
    grids = geometry.level_grids(height_px, width_px)
    levels = zip(model.feature_specs, grids, geometry.level_stages, geometry.level_scales, strict=True)
    for spec, grid, stage, scale in levels:
        trained = work.ends(stage)[-1].upstream or scale > 1
        features.append((spec, torch.empty(1, spec.channels, *grid, device="meta", requires_grad=trained)))
    return tuple(features)


# Building takes longer than counting, and several conventions count one network.
@lru_cache(maxsize=4)
def _build(config: PiipConfig, head: ClassifierConfig | None) -> Trunk:
    with torch.device("meta"):
        return PIIP(config) if head is None else PiipClassifier(config, head)


def _rest(model: Trunk, work: NetworkWork, training: bool) -> list[PartCount]:
    config = model.config
    if isinstance(model, PiipClassifier):
        return [part_count("head", model.head, work.class_head(model.head_config), training=training)]
    assert isinstance(model, PIIP)
    merging = total(map(work.merging, set(model.geometry.level_stages)))
    parts = [part_count("merging", model.mergings, merging, training=training)] if len(config.branches) > 1 else []
    return [*parts, part_count("pyramid", model.pyramid, work.pyramid(), training=training)]


def num_parameters(module: nn.Module) -> int:
    """Parameters of a module, frozen ones included."""
    return sum(parameter.numel() for parameter in module.parameters())
