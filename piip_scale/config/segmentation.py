"""Config of a segmentation run: segmentor, inference and augmentation."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from piip_scale.config.base import Positive, Strict
from piip_scale.config.run import DataConfig, PositiveFloat, Rate, Rgb, RunConfig, check_padding

Size = tuple[Positive, Positive]
Range = tuple[PositiveFloat, PositiveFloat]


class InferenceConfig(Strict):
    """How an image is segmented outside training.

    Attributes:
        mode: ``whole`` images at once, padded to ``augment.pad_multiple_px`` and no further; or ``slide`` a window over
            each, which sees no padding, and average where windows overlap.
        crop_px: Height and width of the window.
        stride_px: Its steps down and to the right.
    """

    mode: Literal["whole", "slide"] = "whole"
    crop_px: Size | None = None
    stride_px: Size | None = None

    @model_validator(mode="after")
    def _windows_cover(self) -> InferenceConfig:
        given = {self.crop_px is not None, self.stride_px is not None}
        if given != {self.mode == "slide"}:
            raise ValueError(
                f"mode={self.mode!r} with crop_px={self.crop_px} and stride_px={self.stride_px}: slide needs both, "
                "whole takes neither"
            )
        if self.crop_px and self.stride_px and any(s > c for s, c in zip(self.stride_px, self.crop_px, strict=True)):
            raise ValueError(f"stride_px={list(self.stride_px)} must not be above crop_px={list(self.crop_px)}")
        return self


class SegmentorConfig(Strict):
    """The mmseg heads on top of the network.

    Attributes:
        kind: Which of mmseg's own base configs to start from.
        overrides: Merged onto that mmseg model dict, in mmseg's own terms: ``{"decode_head.channels": 1536}`` or
            nested dicts.
        inference: How images are segmented at evaluation.
    """

    kind: Literal["upernet"] = "upernet"
    overrides: dict[str, Any] = {}
    inference: InferenceConfig = InferenceConfig()


class DistortionConfig(Strict):
    """Photometric distortion as in SSD: each part takes place in half of the images.

    Attributes:
        brightness: Most that is added to the channels, 0 to 255.
        contrast: Range of the factor on them.
        saturation: Range of the factor on HSV's saturation.
        hue: HSV's hue (0-179) is moved by a whole number from minus this to one less than it.
    """

    brightness: Annotated[float, Field(ge=0, le=255)] = 32.0
    contrast: Range = (0.5, 1.5)
    saturation: Range = (0.5, 1.5)
    hue: Annotated[int, Field(ge=1, le=90)] = 18

    @model_validator(mode="after")
    def _ranges_rise(self) -> DistortionConfig:
        for name in ("contrast", "saturation"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name}={[low, high]} must be low <= high")
        return self


class SegmentationAugment(Strict):
    """How an image and its label map become network input.

    Attributes:
        short_edge_px: Of the resized image; the long edge is bounded by ``max_edge_px``.
        max_edge_px: The long edge is never longer.
        scale_range: Training multiplies both edges by a factor drawn from this range.
        crop_px: Height and width of a random crop, which is also the size of every training batch.
        max_class_share: A crop of which one class takes this share or more is drawn again, up to ten times; 1 takes
            the first.
        flip_probability: Of mirroring left and right.
        distortion: Of colours; ``None`` leaves them.
        pad_multiple_px: Both sides of a batch are multiples of it.
        mean: Subtracted from the channels, 0 to 255, red first.
        std: Divides them after that.
    """

    short_edge_px: Positive = 512
    max_edge_px: Positive = 2048
    scale_range: Range = (0.5, 2.0)
    crop_px: Size = (512, 512)
    max_class_share: Rate = 0.75
    flip_probability: Rate = 0.5
    distortion: DistortionConfig | None = DistortionConfig()
    pad_multiple_px: Positive = 32
    mean: Rgb = (123.675, 116.28, 103.53)
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (58.395, 57.12, 57.375)

    @model_validator(mode="after")
    def _sizes_agree(self) -> SegmentationAugment:
        if self.scale_range[0] > self.scale_range[1]:
            raise ValueError(f"scale_range={list(self.scale_range)} must be low <= high")
        if self.short_edge_px > self.max_edge_px:
            raise ValueError(f"short_edge_px={self.short_edge_px} must not be above max_edge_px={self.max_edge_px}")
        if any(side % self.pad_multiple_px for side in self.crop_px):
            raise ValueError(
                f"crop_px={list(self.crop_px)} must be multiples of pad_multiple_px={self.pad_multiple_px}"
            )
        return self


class SegmentationData(DataConfig):
    """Where images and label maps come from, and how they are augmented."""

    augment: SegmentationAugment = SegmentationAugment()

    @model_validator(mode="after")
    def _maps_name_no_classes(self) -> SegmentationData:
        if self.sampling is not None:
            raise ValueError(
                f"sampling.kind={self.sampling.kind!r} counts the images of a class, which sets of label maps do not "
                "say: leave sampling out (augment.max_class_share keeps one class from filling crops)"
            )
        return self


class SegmentationRun(RunConfig):
    """Everything one training of a segmentor is."""

    task: Literal["segmentation"] = "segmentation"
    segmentor: SegmentorConfig = SegmentorConfig()
    data: SegmentationData

    @model_validator(mode="after")
    def _batches_fit_the_pyramid(self) -> SegmentationRun:
        check_padding(self.model, self.data.augment.pad_multiple_px)
        return self

    @model_validator(mode="after")
    def _windows_fit_batches(self) -> SegmentationRun:
        crop_px, multiple = self.segmentor.inference.crop_px, self.data.augment.pad_multiple_px
        if crop_px is not None and any(side % multiple for side in crop_px):
            raise ValueError(
                f"segmentor.inference.crop_px={list(crop_px)} must be multiples of "
                f"data.augment.pad_multiple_px={multiple}"
            )
        return self
