"""The ConvNeXt branch, whose grid shrinks and whose width grows on the way."""

from __future__ import annotations

from torch import Tensor, nn

from piip_scale.config.branches import ConvNextBranchConfig
from piip_scale.config.model import AUTO_KERNELS, Kernels
from piip_scale.geometry import depth_of, drop_path_rate, is_downsampling, locate
from piip_scale.models.branch import Branch, BranchState, check_size
from piip_scale.models.layers import Conv2d, DropPath, LayerScale, Mlp, build_norm
from piip_scale.models.unit import Unit
from piip_scale.ops.residual import Paths

_MLP_RATIO = 4


class ConvNext(Branch):
    """A ConvNeXt that stops after any layer; from its second stage on, a downsampling layer opens each stage.

    Args:
        config: Its numbers.
        kernels: Names of the kernels.

    Source: Liu et al., A ConvNet for the 2020s.
    """

    has_layer_decay = False

    def __init__(self, config: ConvNextBranchConfig, kernels: Kernels = AUTO_KERNELS) -> None:
        super().__init__()
        self.config = config
        self.embedding = Stem(config.widths[0], config.sections[0].stride_px)
        self.blocks = nn.ModuleList(_build_layer(config, index, kernels) for index in range(depth_of(config.sections)))

    def embed(self, image_BCHW: Tensor) -> BranchState:
        """See ``Branch.embed``."""
        check_size(image_BCHW, self.config.sections[-1].stride_px)
        return BranchState(self.embedding(image_BCHW))

    def run(self, state: BranchState, first: int, last: int) -> BranchState:
        """See ``Branch.run``."""
        grid_BHWC = state.grid_BHWC
        for block in self.blocks[first:last]:
            grid_BHWC = block(grid_BHWC)
        return BranchState(grid_BHWC)

    def embedding_modules(self) -> list[nn.Module]:
        """See ``Branch.embedding_modules``."""
        return [self.embedding]


class Stem(nn.Module):
    """Patches to tokens, normalised."""

    def __init__(self, dim: int, patch: int) -> None:
        super().__init__()
        self.proj = Conv2d(3, dim, kernel_size=patch, stride=patch)
        self.norm = build_norm("layernorm", dim)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, H // patch, W // patch, C)."""
        output: Tensor = self.norm(self.proj(image_BCHW).permute(0, 2, 3, 1))
        return output


class Downsample(Unit):
    """Normalised 2x2 cells to one."""

    def __init__(self, dim: int, wider_dim: int, checkpointed: bool) -> None:
        super().__init__(checkpointed)
        self.norm = build_norm("layernorm", dim)
        self.proj = Conv2d(dim, wider_dim, kernel_size=2, stride=2)

    def draw(self, grid_BHWC: Tensor) -> tuple[Paths | None, ...]:
        """See ``Unit.draw``: none."""
        return ()

    def compute(self, drawn: tuple[Paths | None, ...], grid_BHWC: Tensor) -> Tensor:
        """(B, H, W, C) to (B, H // 2, W // 2, C')."""
        output: Tensor = self.proj(self.norm(grid_BHWC).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return output


class Block(Unit):
    """A 7x7 depthwise convolution and a feed-forward, added to the input."""

    def __init__(self, dim: int, scale: LayerScale, drop_path: DropPath, checkpointed: bool, kernel: str) -> None:
        super().__init__(checkpointed)
        self.dwconv = Conv2d(dim, dim, kernel_size=7, padding=3, groups=dim)
        self.norm = build_norm("layernorm", dim)
        self.mlp = Mlp(dim, _MLP_RATIO * dim, "gelu", kernel)
        self.ls = scale
        self.drop_path = drop_path

    def draw(self, grid_BHWC: Tensor) -> tuple[Paths | None, ...]:
        """See ``Unit.draw``."""
        return (self.drop_path.draw(grid_BHWC),)

    def compute(self, drawn: tuple[Paths | None, ...], grid_BHWC: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape."""
        output: Tensor = self.drop_path(grid_BHWC, self._residual, self.ls, drawn[0])
        return output

    def _residual(self, grid_BHWC: Tensor) -> Tensor:
        hidden_BHWC = self.dwconv(grid_BHWC.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        residual: Tensor = self.mlp(self.norm(hidden_BHWC))
        return residual


def _build_layer(config: ConvNextBranchConfig, index: int, kernels: Kernels) -> Unit:
    sections = config.sections
    stage, _ = locate(sections, index)
    if is_downsampling(sections, index):
        return Downsample(config.widths[stage - 1], config.widths[stage], bool(config.checkpoint_blocks))
    rate = drop_path_rate(sections, index, config.drop_path_rate, config.drop_path_schedule)
    dim = config.widths[stage]
    scale = LayerScale(dim, config.layer_scale_init, kernels.fused)
    return Block(dim, scale, DropPath(rate, config.drop_path_mode), bool(config.checkpoint_blocks), kernels.fused)
