"""What leaves of foreign heads have in common: float32 inside, and how the engine sees them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from piip_scale.models.class_layers import SOME_CLASSES, ClassLayer, class_layers
from piip_scale.models.piip import PIIP
from piip_scale.models.rules import ParameterRule
from piip_scale.models.saved_activations import HeadBytes
from piip_scale.tasks.base import DTYPES, Outline
from piip_scale.tasks.mmlab import MMLogger


def call_in_float32(module: nn.Module, *inputs: Any, **options: Any) -> Any:
    """Calls a module with its weights cast to float32, whatever ZeRO keeps them in; the cast has a gradient.

    Buffers that the call changes, such as running statistics, are kept.
    """
    weights = {name: parameter.float() for name, parameter in module.named_parameters()}
    buffers = {name: _single(buffer) for name, buffer in module.named_buffers()}
    result = torch.func.functional_call(module, weights | buffers, inputs, options)
    for name, buffer in module.named_buffers():
        if buffer is not buffers[name]:
            buffer.copy_(buffers[name])
    return result


class Anchor:
    """Ties losses to features: in the backward pass each feature gets a gradient, one that no loss reads gets zeros.

    A rank without objects must reach every feature all the same, or its backward pass differs from the others'. Adding
    each feature's sum times zero to the losses would do so too, at the price of reading every map, and of adding zeros
    to every gradient.
    """

    def __init__(self) -> None:
        self.zero: Tensor | None = None

    def take(self, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The features (B, C, H, W), for whatever computes losses of them."""
        taken: tuple[Tensor, ...] = _Taken.apply(self, *features)
        return taken

    def tie(self, losses: Sequence[Tensor], features: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The losses as they are.

        Args:
            losses: Of any shapes.
            features: From ``take``.
        """
        tied: tuple[Tensor, ...] = _Tied.apply(self, len(losses), *losses, *features)
        return tied


class _Taken(torch.autograd.Function):
    """Features as they are; zeros for the gradient of one that has none."""

    @staticmethod
    def forward(ctx: Any, anchor: Anchor, *features: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.anchor, ctx.shapes = anchor, [feature.shape for feature in features]
        return tuple(feature.view_as(feature) for feature in features)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        zero = ctx.anchor.zero
        pairs = zip(gradients, ctx.shapes, strict=True)
        return None, *(zero.expand(shape) if gradient is None else gradient for gradient, shape in pairs)


class _Tied(torch.autograd.Function):
    """Losses as they are; features stand among the inputs, so that their backward pass comes after this one."""

    @staticmethod
    def forward(ctx: Any, anchor: Anchor, num_losses: int, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.anchor, ctx.num_features = anchor, len(inputs) - num_losses
        return tuple(loss.view_as(loss) for loss in inputs[:num_losses])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        # NaN where a loss was not finite: that must reach every rank.
        ctx.anchor.zero = torch.stack([gradient.sum() for gradient in gradients]).sum() * 0
        return None, None, *gradients, *[None] * ctx.num_features


class Heads(nn.Module):
    """A leaf of foreign heads."""

    def for_classes(self, num_classes: int) -> Heads:
        """The same heads, new, for another number of classes."""
        raise NotImplementedError


class NetworkWithHeads(nn.Module):
    """A PIIP network and one leaf of foreign heads, as the engine sees them: a ``TrainableModel`` but for its losses.

    Args:
        backbone: The network.
        heads: The leaf.
    """

    def __init__(self, backbone: PIIP, heads: Heads) -> None:
        super().__init__()
        self.backbone, self.heads = backbone, heads

    not_static = "neck and heads are left out: what they compute follows what they find in an image"

    def static_outputs(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        """What of the model is the same computation for every image of a size; ``not_static`` says what is left out.

        Args:
            images_BCHW: Normalised images, float32 (B, 3, H, W).

        Returns:
            The network's maps, float32 (B, C, H / stride, W / stride), by ``features_STRIDE``.
        """
        strides = [f"features_{spec.stride_px:g}" for spec in self.backbone.feature_specs]
        return dict(zip(strides, self.backbone(images_BCHW), strict=True))

    def heads_module(self) -> nn.Module:
        """The heads, and what lies between them and the network."""
        return self.heads

    def call_order(self) -> list[list[nn.Module]]:
        """See ``Trunk.call_order``."""
        return [*self.backbone.call_order(), [self.heads]]

    def parts(self) -> dict[str, nn.Module]:
        """Branches, largest first, then what joins them, and the heads."""
        return network_parts(self.backbone) | {"heads": self.heads}

    def parameter_rules(self) -> dict[str, ParameterRule]:
        """The network's own rules; the heads come last, and their biases and 1-D weights do not decay."""
        rules = {f"backbone.{name}": rule for name, rule in self.backbone.parameter_rules().items()}
        return rules | head_rules("heads", self.heads, self.num_layers)

    def class_layers(self) -> dict[str, ClassLayer]:
        """What follows from the number of classes, found by building the heads, without values, for two numbers."""
        with torch.device("meta"):
            fewer, more = (self.heads.for_classes(number).state_dict() for number in SOME_CLASSES)
        return {f"heads.{name}": layer for name, layer in class_layers(fewer, more).items()}

    @property
    def num_layers(self) -> int:
        """Depth of the deepest branch."""
        return self.backbone.num_layers

    def set_precision(self, dtype: torch.dtype) -> None:
        """Dtype of the network; heads and losses stay float32."""
        self.backbone.set_precision(dtype)


def outline_with_heads(
    model: NetworkWithHeads, precision: str, images_BCHW: Tensor, head_bytes: Callable[[Sequence[Tensor]], HeadBytes]
) -> Outline:
    """What planning needs of such a model, on the meta device."""
    model.train().set_precision(DTYPES[precision])
    return Outline(model, model.backbone, model.parts(), "heads", partial(model.backbone, images_BCHW), head_bytes)


def network_parts(network: PIIP) -> dict[str, nn.Module]:
    """Branches, largest first, then what joins them."""
    branches = {f"branch {index}": branch for index, branch in enumerate(network.branches)}
    return branches | {name: child for name, child in network.named_children() if name != "branches"}


def head_rules(prefix: str, heads: nn.Module, num_layers: int) -> dict[str, ParameterRule]:
    """Heads come after the last of the network's layers; their biases and 1-D weights do not decay."""
    rules = {}
    for name, parameter in heads.named_parameters():
        # ZeRO-3 keeps a sharded parameter's real shape in ds_shape.
        num_axes = len(getattr(parameter, "ds_shape", parameter.shape))
        decays = num_axes != 1 and not name.endswith("bias")
        rules[f"{prefix}.{name}"] = ParameterRule(float(num_layers + 1), decays, fresh=True)
    return rules


@contextmanager
def quiet_mmengine() -> Iterator[None]:
    """Mmengine logs three lines for every parameter it initialises."""
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def _single(buffer: Tensor) -> Tensor:
    return buffer.float() if buffer.is_floating_point() else buffer
