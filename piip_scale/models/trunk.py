"""Branches and the units between them: what every network of the family shares, whatever it ends in."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from piip_scale.config.branches import BranchConfig, ConvNextBranchConfig, Statistics, VitBranchConfig
from piip_scale.config.model import Kernels, PiipConfig
from piip_scale.errors import ModelError
from piip_scale.geometry import num_frozen_blocks
from piip_scale.models.branch import Branch, BranchState, FeatureSpec
from piip_scale.models.convnext import ConvNext
from piip_scale.models.interaction import build_unit, exchange
from piip_scale.models.layers import DropPath
from piip_scale.models.lora import LORA, add_lora
from piip_scale.models.rotary import RotaryPositions
from piip_scale.models.rules import ParameterRule
from piip_scale.models.statistics import Recolouring, recolouring
from piip_scale.models.stored import store_frozen
from piip_scale.models.unit import Unit
from piip_scale.models.vit import Vit
from piip_scale.ops.attention import require_attention_kernel
from piip_scale.ops.deform_attention import require_deform_kernel
from piip_scale.ops.fused import require_fused_kernel
from piip_scale.ops.resize import resize_image


class Trunk(nn.Module):
    """Branches of falling size that see one image at rising resolution, and keep exchanging features.

    Args:
        config: The network.

    Raises:
        KernelError: A kernel that the config names is not installed.
    """

    def __init__(self, config: PiipConfig) -> None:
        super().__init__()
        require_attention_kernel(config.attention_kernel)
        require_deform_kernel(config.deform_kernel)
        require_fused_kernel(config.fused_kernel)
        self.config, self.geometry = config, config.geometry
        self._recolourings: list[Recolouring | None] | None = None
        self.branches = nn.ModuleList(_build_branch(branch, config.kernels) for branch in config.branches)
        self.interactions = nn.ModuleList(self._build_units(stage) for stage in range(config.interaction.num_stages))
        for branch, numbers in zip(self._branches, config.branches, strict=True):
            _freeze(branch, num_frozen_blocks(numbers.sections, numbers.frozen_blocks))
            if isinstance(numbers, VitBranchConfig):
                store_frozen(branch, numbers)
                add_lora(branch, numbers)

    def take_images_of(self, mean: Statistics, std: Statistics) -> None:
        """Says how the images that ``walk`` gets are normalised, for branches with statistics of their own.

        Args:
            mean: Subtracted from the channels, 0 to 255.
            std: Divides them after that.
        """
        self._recolourings = [recolouring(branch, mean, std) for branch in self.config.branches]

    def walk(self, image_BCHW: Tensor) -> Iterator[list[BranchState]]:
        """The branches' states after each stage.

        Args:
            image_BCHW: Normalised images (B, 3, H, W) at the last branch's resolution, any float dtype.

        Raises:
            ModelError: The images are too small for a branch, or in statistics that nobody has said while a branch has
                its own.
        """
        states = [branch.embed(self._image_of(index, image_BCHW)) for index, branch in enumerate(self._branches)]
        for stage, units in enumerate(self.interactions):
            states = self._run_blocks(states, stage)
            grids = [state.grid_BHWC for state in states]
            # From the highest-resolution pair down, so detail reaches the largest model within one stage.
            for large in reversed(range(len(grids) - 1)):
                unit = cast("Unit", cast("nn.ModuleList", units)[large])
                grids[large], grids[large + 1] = exchange(unit, grids[large], grids[large + 1])
            states = [state.with_grid(grid) for grid, state in zip(grids, states, strict=True)]
            yield states

    def call_order(self) -> list[list[nn.Module]]:
        """All that holds parameters, in the order of calls: the modules of an entry compute on one device."""
        stages = range(len(self.interactions))
        return [branch.embedding_modules() for branch in self._branches] + [
            modules for stage in stages for modules in self._stage_modules(stage)
        ]

    def specs_after(self, stage: int) -> list[FeatureSpec]:
        """Every branch's width and stride after a stage, the stride in pixels of the branch's own input."""
        sections = [self.geometry.section_after(index, stage) for index in range(len(self.config.branches))]
        return [FeatureSpec(section.width, section.stride_px) for section in sections]

    @property
    def num_layers(self) -> int:
        """Blocks of the deepest branch with layer decay, the scale of ``ParameterRule.layer_id``."""
        layered = [branch for branch in self._branches if branch.has_layer_decay] or self._branches
        return max(len(branch.blocks) for branch in layered)

    def set_precision(self, dtype: torch.dtype) -> None:
        """Casts the network; norm statistics, sampling locations, resizing and what leaves it stay float32."""
        self.to(dtype)

    def parameter_rules(self) -> dict[str, ParameterRule]:
        """The rule of every parameter, by its name in ``named_parameters()``.

        Source: PIIP's released layer decay. A shallow branch's blocks are spread over the deepest one's layer ids.
        """
        layer_ids: dict[int, float] = {}
        for branch in self._branches:
            if branch.has_layer_decay:
                layer_ids |= _layer_ids(branch, self.num_layers / len(branch.blocks))
        rest = float(self.num_layers + 1)
        kept_whole = self._never_decaying()
        return {
            name: ParameterRule(
                layer_ids.get(id(p), rest),
                decays=_decays(name, p) and id(p) not in kept_whole,
                fresh=not name.startswith("branches.") or LORA in name,
            )
            for name, p in self.named_parameters()
        }

    def _never_decaying(self) -> set[int]:
        # The released optimiser spares a plain transformer's position embedding and class token, not a pyramid's.
        single = self._branches[0] if len(self._branches) == 1 else None
        if not isinstance(single, Vit):
            return set()
        tokens = [part.token for part in (single.class_token, single.registers) if part is not None]
        return {id(parameter) for parameter in (single.embedding.position, *tokens) if parameter is not None}

    def _stage_modules(self, stage: int) -> list[list[nn.Module]]:
        """``call_order`` of a stage."""
        units = cast("nn.ModuleList", self.interactions[stage])
        blocks = [
            [block]
            for index, branch in enumerate(self._branches)
            for block in branch.blocks[slice(*self._blocks_of(index, stage))]
        ]
        return [*blocks, *([unit] for unit in reversed(units))]

    def _image_of(self, index: int, image_BCHW: Tensor) -> Tensor:
        """What a branch sees: the image at its resolution, in its statistics."""
        branch = self.config.branches[index]
        image = resize_image(image_BCHW, branch.resolution_px / self.config.branches[-1].resolution_px)
        if self._recolourings is not None:
            own = self._recolourings[index]
            return image if own is None else own(image)
        if branch.mean is not None:
            raise ModelError(
                f"branch {index} has pixel statistics of its own, and those of its images are not known",
                fix="call take_images_of first",
            )
        return image

    def _run_blocks(self, states: list[BranchState], stage: int) -> list[BranchState]:
        return [
            branch.run(state, *self._blocks_of(index, stage))
            for index, (branch, state) in enumerate(zip(self._branches, states, strict=True))
        ]

    def _blocks_of(self, branch: int, stage: int) -> tuple[int, int]:
        """The first block that a branch runs in a stage, and the one behind the last."""
        end = self.geometry.last_block(branch, stage) + 1
        return end - self.geometry.blocks_per_stage[branch][stage], end

    def _build_units(self, stage: int) -> nn.ModuleList:
        kernels = self.config.kernels
        return nn.ModuleList(
            build_unit(self.config.interaction, large.channels, small.channels, kernels)
            for large, small in pairwise(self.specs_after(stage))
        )

    @property
    def _branches(self) -> list[Branch]:
        return cast("list[Branch]", list(self.branches))


def _build_branch(config: BranchConfig, kernels: Kernels) -> Branch:
    if isinstance(config, ConvNextBranchConfig):
        return ConvNext(config, kernels)
    return Vit(config, kernels)


def _freeze(branch: Branch, num_blocks: int) -> None:
    frozen = [*branch.embedding_modules(), *branch.blocks[:num_blocks]] if num_blocks else []
    for module in frozen:
        module.requires_grad_(False)
        for part in module.modules():
            if isinstance(part, DropPath):
                part.rate = 0.0
            elif isinstance(part, RotaryPositions):
                part.rescale = 1.0


def _layer_ids(branch: Branch, stretch: float) -> dict[int, float]:
    ids = {id(parameter): 0.0 for module in branch.embedding_modules() for parameter in module.parameters()}
    for index, block in enumerate(branch.blocks):
        ids |= {id(parameter): (index + 1) * stretch for parameter in block.parameters()}
    return ids


def _decays(name: str, parameter: nn.Parameter) -> bool:
    # ZeRO-3 keeps a sharded parameter's real shape in ds_shape.
    shape = getattr(parameter, "ds_shape", parameter.shape)
    # The merging's single numbers have no axis in the released code, whose rule for one axis lets them decay.
    return (len(shape) != 1 or shape.numel() == 1) and not name.endswith(".bias")
