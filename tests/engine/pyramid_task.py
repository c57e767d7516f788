"""A real network of two branches under a small head, for what only a network's own config can say."""

from __future__ import annotations

import torch
from tiny_configs import tiny_config
from tiny_task import TinyTask
from torch import Tensor, nn

from piip_scale.models.piip import PIIP
from piip_scale.models.rules import ParameterRule

_SIDE = {"resolution_px": 16, "pretrain_resolution_px": 16, "patch_size_px": 4}
LARGE = {"kind": "vit", "embed_dim": 64, "depth": 4, "num_heads": 2, "layer_scale_init": 1.0} | _SIDE
SMALL = {"kind": "vit", "embed_dim": 32, "depth": 2, "num_heads": 2} | _SIDE


def network(large=(), small=(), **changes) -> dict:
    branches = [LARGE | dict(large), SMALL | dict(small)]
    interaction = {"num_stages": 2, "num_heads": 2, "gamma_init": 0.1}
    return {"branches": branches, "interaction": interaction, "pyramid": {"scales": [1.0]}} | changes


def pyramid_config(model=None, **sections):
    return tiny_config(model=network() if model is None else model, **sections)


class MeanHead(nn.Module):
    """Float32 whatever its weights are in."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.score = nn.Linear(dim, 1)
        # Like the norm statistics of a detector's: a buffer that is float32 for good.
        self.register_buffer("offset", torch.ones(1))

    def forward(self, feature_BCHW: Tensor) -> tuple[Tensor]:
        pooled = feature_BCHW.float().mean((2, 3))
        return ((pooled @ self.score.weight.float().T + self.score.bias.float() + self.offset).square().mean(),)


class PyramidModel(nn.Module):
    def __init__(self, config) -> None:
        super().__init__()
        with torch.device("meta"):
            self.backbone = PIIP(config)
        self.backbone.take_images_of((127.5,) * 3, (127.5,) * 3)
        self.head = MeanHead(self.backbone.feature_specs[0].channels)

    def forward(self, batch) -> dict[str, Tensor]:
        (loss,) = self.head(*self.backbone(batch.images_BHWC.permute(0, 3, 1, 2).float() / 255))
        return {"loss": loss}

    def heads_module(self) -> nn.Module:
        return self.head

    def parts(self) -> dict[str, nn.Module]:
        large, small = self.backbone.branches
        return {"large": large, "small": small, "head": self.head}

    def parameter_rules(self) -> dict[str, ParameterRule]:
        rules = {f"backbone.{name}": rule for name, rule in self.backbone.parameter_rules().items()}
        return rules | {
            f"head.score.{key}": ParameterRule(self.num_layers + 1.0, False, fresh=True) for key in ("weight", "bias")
        }

    @property
    def num_layers(self) -> int:
        return self.backbone.num_layers

    def set_precision(self, dtype: torch.dtype) -> None:
        self.backbone.set_precision(dtype)


class PyramidTask(TinyTask):
    def build_model(self) -> nn.Module:
        return PyramidModel(self.config.model)
