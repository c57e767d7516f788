"""Detection in image files outside shards."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageOps
import torch

from piip_scale.config.run import AugmentConfig
from piip_scale.data.batch import Batch, ImageInfo, Instances
from piip_scale.data.sample import Image, decode_image
from piip_scale.data.transforms import evaluation_geometry
from piip_scale.errors import DataError
from piip_scale.tasks.base import Detections
from piip_scale.tasks.detectors import DetectionModel


def read_image(path: Path) -> Image:
    """An image file's pixels, RGB uint8 (H, W, 3); a photograph that its EXIF data say to turn is turned upright.

    Raises:
        DataError: The file is absent, truncated, or not an image.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"image {path} cannot be read", value=error.strerror, fix="check the path") from None
    pixels = decode_image(content, str(path))
    photo = PIL.Image.open(io.BytesIO(content))
    if photo.getexif().get(PIL.ExifTags.Base.Orientation, 1) == 1:
        return pixels
    return np.array(PIL.ImageOps.exif_transpose(photo).convert("RGB"))


def predict_image(model: DetectionModel, augment: AugmentConfig, pixels: Image, image_id: int = 1) -> Detections:
    """What a detector finds in one image, in its own pixels.

    Args:
        model: In eval mode, on any device.
        augment: Of its run; the image is resized as for evaluation.
        pixels: RGB, uint8 (H, W, 3).
        image_id: What the result is called.
    """
    height, width = pixels.shape[:2]
    geometry = evaluation_geometry((height, width), augment)
    resized, multiple = geometry.image(pixels), augment.pad_multiple_px
    canvas = np.zeros((*(-(-side // multiple) * multiple for side in geometry.size_px), 3), np.uint8)
    canvas[: resized.shape[0], : resized.shape[1]] = resized
    info = ImageInfo(f"image {image_id}", image_id, (height, width), geometry.size_px, geometry.scale_xy)
    nothing = Instances(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.bool))
    batch = Batch(torch.from_numpy(canvas)[None], (nothing,), (info,))
    device = next(model.parameters()).device
    return model.predict(batch.to(device))[0]
