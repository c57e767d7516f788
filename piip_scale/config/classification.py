"""Config of a classification run: head, loss and augmentation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from piip_scale.config.base import Strict
from piip_scale.config.run import DataConfig, PositiveFloat, Rate, Rgb, RunConfig

_POLICIES = ("rand", "augmix", "original", "v0")

Alpha = Annotated[float, Field(ge=0)]
Smoothing = Annotated[float, Field(ge=0, lt=1)]


class MixConfig(Strict):
    """Mixing pairs of images and their labels, in timm's terms; one draw decides for a whole micro-batch.

    Attributes:
        mixup_alpha: Of the beta distribution that shares of blended images are drawn from; 0 never blends.
        cutmix_alpha: Likewise of the area that is cut from the other image; 0 never cuts.
        probability: Share of the micro-batches that are mixed.
        switch_probability: Share of those that are cut, where both ways are open.
    """

    mixup_alpha: Alpha = 0.8
    cutmix_alpha: Alpha = 1.0
    probability: Rate = 1.0
    switch_probability: Rate = 0.5

    @model_validator(mode="after")
    def _mixes_somehow(self) -> MixConfig:
        if not (self.mixup_alpha or self.cutmix_alpha):
            raise ValueError("mixup_alpha and cutmix_alpha are both 0: set one of them, or mix=None")
        return self


class ImageAugmentConfig(Strict):
    """How an image becomes network input: timm's ImageNet transforms, at the size of the highest-resolution branch.

    Attributes:
        crop_scale: Range of the share of an image's area that a training crop keeps.
        crop_ratio: Range of the crop's width over height, before it is resized to a square.
        flip_probability: Of mirroring left and right.
        auto_augment: timm's name of a policy, such as ``rand-m9-mstd0.5-inc1``; ``None`` for none.
        color_jitter: Strength of random brightness, contrast and saturation; not together with a policy.
        erase_probability: Share of the training images of which a rectangle is replaced by noise.
        mix: Blending and cutting of image pairs; ``None`` leaves images alone.
        interpolation: Of every resize; ``random`` draws one for each training image and evaluates with ``bicubic``.
        eval_crop_share: Side of the centre crop over the short edge of the resized image, in evaluation.
        mean: Subtracted from the channels, 0 to 255, red first.
        std: Divides them after that.
    """

    crop_scale: tuple[Rate, Rate] = (0.08, 1.0)
    crop_ratio: tuple[PositiveFloat, PositiveFloat] = (3 / 4, 4 / 3)
    flip_probability: Rate = 0.5
    auto_augment: str | None = None
    color_jitter: Annotated[float, Field(ge=0)] = 0.0
    erase_probability: Rate = 0.0
    mix: MixConfig | None = None
    interpolation: Literal["bilinear", "bicubic", "random"] = "bicubic"
    eval_crop_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    mean: Rgb = (123.675, 116.28, 103.53)
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (58.395, 57.12, 57.375)

    @model_validator(mode="after")
    def _ways_agree(self) -> ImageAugmentConfig:
        for name in ("crop_scale", "crop_ratio"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name}={[low, high]} must be 0 < low <= high")
        if self.auto_augment is not None and self.color_jitter:
            raise ValueError(
                f"auto_augment={self.auto_augment!r} changes colours by itself: "
                f"leave color_jitter={self.color_jitter} at 0, or auto_augment out"
            )
        if self.auto_augment is not None and not self.auto_augment.startswith(_POLICIES):
            raise ValueError(
                f"auto_augment={self.auto_augment!r} must begin as timm's policies do: {', '.join(_POLICIES)}"
            )
        return self


class ClassificationData(DataConfig):
    """Where labelled images come from, and how they are augmented."""

    augment: ImageAugmentConfig = ImageAugmentConfig()

    @model_validator(mode="after")
    def _pairs_are_whole(self) -> ClassificationData:
        if self.augment.mix is not None and self.micro_batch_size % 2:
            raise ValueError(
                f"micro_batch_size={self.micro_batch_size} must be even: augment.mix takes images in pairs"
            )
        return self


class ClassHeadConfig(Strict):
    """The head and its loss; the shards hold how many classes there are.

    Attributes:
        separate: A norm and a linear head for every branch, logits averaged; otherwise one head over the mean of the
            merged features.
        label_smoothing: Share of a target that is spread evenly over all classes.
    """

    separate: bool = True
    label_smoothing: Smoothing = 0.0


class ClassificationRun(RunConfig):
    """Everything one training of a classifier is."""

    task: Literal["classification"]
    classifier: ClassHeadConfig = ClassHeadConfig()
    data: ClassificationData
