"""Config of a detection run: detector and augmentation."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from piip_scale.config.base import Positive, Strict
from piip_scale.config.run import DataConfig, PositiveFloat, Rate, Rgb, RunConfig, check_padding


class DetectorConfig(Strict):
    """The mmdet detector on top of the network.

    Attributes:
        kind: Which of mmdet's own base configs to start from.
        overrides: Merged onto that mmdet model dict, in mmdet's own terms:
            ``{"rpn_head.anchor_generator.scales": [4]}`` or nested dicts.
    """

    kind: Literal["mask_rcnn", "faster_rcnn", "cascade_mask_rcnn", "dino"]
    overrides: dict[str, Any] = {}


class CropFirstConfig(Strict):
    """The second way of DETR's recipes: an image is resized and a part of it cut out before it is resized as usual.

    Attributes:
        short_edge_px: Candidate short edges of the first resize; the long edge has the usual bound.
        crop_range_px: Height and width of the part are drawn from this range, ends included, each by itself.
        probability: Share of the training images that go this way.
    """

    short_edge_px: tuple[Positive, ...]
    crop_range_px: tuple[Positive, Positive]
    probability: Rate = 0.5

    @model_validator(mode="after")
    def _ranges_hold_something(self) -> CropFirstConfig:
        if not self.short_edge_px:
            raise ValueError("short_edge_px is empty and must name at least one size")
        if self.crop_range_px[0] > self.crop_range_px[1]:
            raise ValueError(f"crop_range_px={list(self.crop_range_px)} must be low <= high")
        return self


class PhotometricConfig(Strict):
    """Distortion of colours as in SSD's recipes, each part in half of the training images; also swaps channels.

    Attributes:
        brightness: Most that is added to the channels, 0 to 255.
        contrast: Range of the factor on them.
        saturation: Range of the factor on HSV's saturation.
        hue_degrees: Most that HSV's hue is turned.
    """

    brightness: Annotated[float, Field(ge=0, le=255)] = 32.0
    contrast: tuple[PositiveFloat, PositiveFloat] = (0.5, 1.5)
    saturation: tuple[PositiveFloat, PositiveFloat] = (0.5, 1.5)
    hue_degrees: Annotated[float, Field(ge=0, le=180)] = 18.0

    @model_validator(mode="after")
    def _ranges_rise(self) -> PhotometricConfig:
        for name in ("contrast", "saturation"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name}={[low, high]} must be low <= high")
        return self


class AugmentConfig(Strict):
    """How an image becomes network input. Without jitter the short edge takes the single size given.

    Attributes:
        short_edge_px: Candidate short edges, one drawn per training image; evaluation takes the last.
        max_edge_px: The long edge is never longer.
        crop_first: What a share of the training images goes through before that.
        jitter_scale: Large-scale jitter, a range of factors, instead of ``short_edge_px``; then ``crop_px`` is needed.
        crop_px: Height and width of a random crop of the resized image; an image that is smaller stays whole. Under
            jitter every batch has this size.
        recompute_boxes: The box of an object that a crop cuts becomes that of its remaining mask, where it has one;
            otherwise it is cut itself.
        flip_probability: Of mirroring left and right.
        photometric: Distortion of the stored image's colours; ``None`` leaves them.
        pad_multiple_px: Both sides of a batch are multiples of it.
        mean: Subtracted from the channels, 0 to 255, red first.
        std: Divides them after that.
    """

    short_edge_px: tuple[Positive, ...] = (800,)
    max_edge_px: Positive = 1333
    crop_first: CropFirstConfig | None = None
    jitter_scale: tuple[float, float] | None = None
    crop_px: tuple[Positive, Positive] | None = None
    recompute_boxes: bool = True
    flip_probability: Rate = 0.5
    photometric: PhotometricConfig | None = None
    pad_multiple_px: Positive = 64
    mean: Rgb = (123.675, 116.28, 103.53)
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (58.395, 57.12, 57.375)

    @model_validator(mode="after")
    def _ways_agree(self) -> AugmentConfig:
        if self.jitter_scale and self.crop_px is None:
            raise ValueError("jitter_scale makes images of any size: set crop_px as well")
        if self.jitter_scale and self.crop_first:
            raise ValueError("jitter_scale and crop_first are two ways to vary the scale: set one of them")
        if self.jitter_scale and not 0 < self.jitter_scale[0] <= self.jitter_scale[1]:
            raise ValueError(f"jitter_scale={list(self.jitter_scale)} must be 0 < low <= high")
        if not self.short_edge_px:
            raise ValueError("short_edge_px is empty and must name at least one size")
        return self


class DetectionData(DataConfig):
    """Where boxes and masks come from, and how their images are augmented.

    Attributes:
        group_by_aspect: Tall images share training batches with tall ones, wide with wide ones, which saves padding;
            the order keeps all its guarantees. For batches of several images whose size follows from theirs.
        polygons: Batches carry the objects' outlines beside their masks, for heads that want them.
    """

    augment: AugmentConfig = AugmentConfig()
    group_by_aspect: bool = False
    polygons: bool = False

    @model_validator(mode="after")
    def _groups_of_something(self) -> DetectionData:
        if self.group_by_aspect and (self.augment.jitter_scale is not None or self.micro_batch_size == 1):
            raise ValueError(
                "group_by_aspect=True saves no padding where every batch has the crop's size (augment.jitter_scale) or "
                f"one image (micro_batch_size={self.micro_batch_size}): leave it out"
            )
        return self


class DetectionRun(RunConfig):
    """Everything one training of a detector is."""

    task: Literal["detection"] = "detection"
    detector: DetectorConfig
    data: DetectionData

    @model_validator(mode="after")
    def _batches_fit_the_pyramid(self) -> DetectionRun:
        check_padding(self.model, self.data.augment.pad_multiple_px)
        return self
