"""The parameter-inverted image pyramid network, for any number of branches."""

from __future__ import annotations

from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from piip_scale.config.model import PiipConfig
from piip_scale.models.branch import Branch, BranchState, FeatureSpec
from piip_scale.models.interaction import InteractionUnit
from piip_scale.models.layers import reset_all_parameters
from piip_scale.models.merging import Merging, NoMerging
from piip_scale.models.pyramid import SimplePyramid
from piip_scale.models.rules import ParameterRule
from piip_scale.models.vit import Vit
from piip_scale.ops.resize import resize_image


class PIIP(nn.Module):
    """Branches of falling size that see one image at rising resolution, and keep exchanging features.

    Built inside ``torch.device("meta")`` it takes no memory: then ``to_empty``, and ``reset_parameters`` or weights.

    Args:
        config: The network.

    Raises:
        KernelError: A kernel that the config names cannot be had.

    Source: Zhu et al., Parameter-Inverted Image Pyramid Networks.
    """

    def __init__(self, config: PiipConfig) -> None:
        super().__init__()
        self.config = config
        self.branches = nn.ModuleList(Vit(branch, config.attention_kernel) for branch in config.branches)
        self.interactions = nn.ModuleList(self._build_units(stage) for stage in range(self._num_stages))
        finals = [branch.spec_after(len(branch.blocks) - 1) for branch in self._branches]
        dims = [spec.channels for spec in finals]
        self.merging: nn.Module = Merging(dims) if len(dims) > 1 else NoMerging()
        self.pyramid = SimplePyramid(config.pyramid, FeatureSpec(dims[0], finals[-1].stride_px))

    @property
    def feature_specs(self) -> tuple[FeatureSpec, ...]:
        """Channels and stride of every map ``forward`` returns, strides in pixels of its input."""
        return self.pyramid.feature_specs

    @property
    def num_layers(self) -> int:
        """Blocks of the deepest branch, the scale of ``ParameterRule.layer_id``."""
        return max(len(branch.blocks) for branch in self._branches)

    def forward(self, image_BCHW: Tensor) -> tuple[Tensor, ...]:
        """Features of a batch of images.

        Args:
            image_BCHW: Normalised images (B, 3, H, W) at the last branch's resolution, any height and width of at
                least one patch in every branch.

        Returns:
            One float32 map (B, channels, H / stride, W / stride) per entry of ``feature_specs``.

        Raises:
            ModelError: The images are too small for a branch.
        """
        states = [
            branch.embed(resize_image(image_BCHW, scale))
            for branch, scale in zip(self._branches, self._scales, strict=True)
        ]
        for stage in range(self._num_stages):
            states = self._run_stage(states, stage)
        features: tuple[Tensor, ...] = self.pyramid(self.merging(*(state.grid_BHWC for state in states)))
        return features

    def _run_stage(self, states: list[BranchState], stage: int) -> list[BranchState]:
        """Each branch's next blocks, then the units from the highest-resolution pair down."""
        states = [
            branch.run(state, *self._block_range(index, stage))
            for index, (branch, state) in enumerate(zip(self._branches, states, strict=True))
        ]
        grids = [state.grid_BHWC for state in states]
        for large in reversed(range(len(grids) - 1)):
            unit = cast(nn.ModuleList, self.interactions[stage])[large]
            grids[large], grids[large + 1] = unit(grids[large], grids[large + 1])
        return [BranchState(grid, state.class_token_B1C) for grid, state in zip(grids, states, strict=True)]

    def reset_parameters(self) -> None:
        """Draws every parameter anew; none needs to have a value before."""
        reset_all_parameters(self)

    def set_precision(self, dtype: torch.dtype) -> None:
        """Casts the network; norm statistics, sampling locations, resizing and the features stay float32."""
        self.to(dtype)

    def parameter_rules(self) -> dict[str, ParameterRule]:
        """The rule of every parameter, by its name in ``named_parameters()``.

        Source: PIIP's released layer decay. A shallow branch's blocks are spread over the deepest one's layer ids.
        """
        layer_ids: dict[int, float] = {}
        for branch in self._branches:
            layer_ids |= _layer_ids(branch, self.num_layers / len(branch.blocks))
        heads = float(self.num_layers + 1)
        return {
            name: ParameterRule(layer_ids.get(id(parameter), heads), self._decays(name, parameter))
            for name, parameter in self.named_parameters()
        }

    def _decays(self, name: str, parameter: nn.Parameter) -> bool:
        # ZeRO-3 keeps a sharded parameter's real shape in ds_shape.
        num_axes = len(getattr(parameter, "ds_shape", parameter.shape))
        alone = len(self.branches) == 1
        return num_axes != 1 and not name.endswith(".bias") and not (alone and name.endswith(".position"))

    def _build_units(self, stage: int) -> nn.ModuleList:
        dims = [
            branch.spec_after(self._block_range(index, stage)[1] - 1).channels
            for index, branch in enumerate(self._branches)
        ]
        kernels = (self.config.attention_kernel, self.config.deform_kernel)
        return nn.ModuleList(
            InteractionUnit(self.config.interaction, large, small, kernels) for large, small in pairwise(dims)
        )

    def _block_range(self, branch: int, stage: int) -> tuple[int, int]:
        counts = self.config.blocks_per_stage(branch)
        return sum(counts[:stage]), sum(counts[: stage + 1])

    @property
    def _branches(self) -> list[Branch]:
        return cast("list[Branch]", list(self.branches))

    @property
    def _num_stages(self) -> int:
        return self.config.interaction.num_stages

    @property
    def _scales(self) -> list[float]:
        sizes = [branch.resolution_px for branch in self.config.branches]
        return [size / sizes[-1] for size in sizes]


def _layer_ids(branch: Branch, stretch: float) -> dict[int, float]:
    ids = {id(parameter): 0.0 for module in branch.embedding_modules() for parameter in module.parameters()}
    for index, block in enumerate(branch.blocks):
        ids |= {id(parameter): (index + 1) * stretch for parameter in block.parameters()}
    return ids
