"""Instance masks that exist only inside their boxes, as mmdet's mask heads want them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from torch import Tensor
from torchvision.ops import roi_align

from piip_scale.errors import KernelError
from piip_scale.tasks.mmlab import BaseInstanceMasks, BitmapMasks

_BORDER_CELLS = 1
# Along each axis. A number that grew with the box would never end on a box that is almost flat.
_SAMPLES_PER_CELL = 4


def _refuse(self: MiniMasks, *_args: object, **_kwargs: object) -> NoReturn:
    raise KernelError(
        "mini-masks cannot be moved or reshaped",
        rule="the loader has augmented them already",
        fix="use a head that only crops them",
    )


class MiniMasks(BaseInstanceMasks):
    """The masks of one image, each stretched to a square over its own box. Read-only.

    Against full-size bitmaps they take a hundredth of the memory, stay on the device, and keep the anti-aliasing of
    the shape they were drawn from.

    Args:
        masks_NSS: Coverage, uint8 0-255 (N, S, S).
        boxes_xyxy_px: What each mask covers, float32 (N, 4), in pixels of the image.
        height: Height of the image in px.
        width: Width of the image in px.
    """

    COVERED = 0.5
    """A cell belongs to a mask that covers so much of it."""

    def __init__(self, masks_NSS: Tensor, boxes_xyxy_px: Tensor, height: int, width: int) -> None:
        self.masks_NSS, self.boxes_xyxy_px = masks_NSS, boxes_xyxy_px
        self.height, self.width = height, width

    def __len__(self) -> int:
        return len(self.masks_NSS)

    def __getitem__(self, index: Any) -> MiniMasks:
        keep = torch.as_tensor(index, device=self.masks_NSS.device) if not isinstance(index, slice) else index
        masks, boxes = self.masks_NSS[keep], self.boxes_xyxy_px[keep]
        return MiniMasks(masks.view(-1, *self.masks_NSS.shape[1:]), boxes.view(-1, 4), self.height, self.width)

    def __deepcopy__(self, memo: object) -> MiniMasks:
        # mmdet deep-copies every sample for the RPN, which never looks at masks.
        return self

    def crop_and_resize(
        self,
        bboxes: NDArray[np.float32],
        out_shape: tuple[int, int],
        inds: NDArray[np.int64],
        device: torch.device | str = "cpu",
        interpolation: str = "bilinear",
        binarize: bool = True,
    ) -> BitmapMasks:
        """What each of R boxes sees of the mask assigned to it.

        Args:
            bboxes: xyxy in px (R, 4).
            out_shape: Height and width of the crops.
            inds: The mask of each box (R,).
            device: Where the boxes live; the masks' own device is used.
            interpolation: Only ``bilinear``, averaged over each cell.
            binarize: Round the coverage to 0 or 1; otherwise it stays a share.

        Returns:
            Bitmaps (R, *out_shape), uint8 or float32.
        """
        coverage = self._crop(torch.as_tensor(bboxes), out_shape, torch.as_tensor(inds))
        crops = (coverage >= self.COVERED).to(torch.uint8) if binarize else coverage
        return BitmapMasks(crops.cpu().numpy(), *out_shape)

    def crops(self, boxes_xyxy_px: Tensor, out_shape: tuple[int, int], indices: Tensor) -> Tensor:
        """What each of R boxes, cut to the image, covers of the mask assigned to it: shares of cells (R, *out_shape).

        Args:
            boxes_xyxy_px: On the masks' device (R, 4).
            out_shape: Height and width of the crops.
            indices: The mask of each box, on the masks' device (R,).
        """
        columns, rows = boxes_xyxy_px[:, 0::2].clamp(0, self.width), boxes_xyxy_px[:, 1::2].clamp(0, self.height)
        return self._crop(torch.stack([columns, rows], dim=2).flatten(1), out_shape, indices)

    def resize(self, out_shape: tuple[int, int], interpolation: str = "bilinear") -> BitmapMasks:
        """The whole image's masks at another size, as bitmaps (N, *out_shape)."""
        image = np.array([[0, 0, self.width, self.height]] * len(self), dtype=np.float32).reshape(-1, 4)
        return self.crop_and_resize(image, out_shape, np.arange(len(self)))

    def to_ndarray(self) -> NDArray[np.uint8]:
        """Bitmaps of the image's size, uint8 (N, height, width)."""
        masks: NDArray[np.uint8] = self.resize((self.height, self.width)).masks
        return masks

    def to_tensor(self, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        """Bitmaps of the image's size, (N, height, width)."""
        return torch.as_tensor(self.to_ndarray(), dtype=dtype, device=device)

    @property
    def areas(self) -> NDArray[np.float32]:
        """Covered area of each instance in square px, float32 (N,)."""
        sides = (self.boxes_xyxy_px[:, 2:] - self.boxes_xyxy_px[:, :2]).clamp(min=0)
        areas: NDArray[np.float32] = (sides.prod(1) * self.masks_NSS.float().mean((1, 2)) / 255).cpu().numpy()
        return areas

    @classmethod
    def cat(cls, masks: Sequence[MiniMasks]) -> MiniMasks:
        """Joins the masks of one image."""
        parts = torch.cat([m.masks_NSS for m in masks]), torch.cat([m.boxes_xyxy_px for m in masks])
        return cls(*parts, masks[0].height, masks[0].width)

    rescale = flip = pad = crop = expand = translate = rotate = _refuse

    def _crop(self, boxes: Tensor, out_shape: tuple[int, int], indices: Tensor) -> Tensor:
        masks, own = self.masks_NSS, self.boxes_xyxy_px
        if not len(indices):
            return torch.zeros((0, *out_shape), device=masks.device)
        indices = indices.to(masks.device)
        # A border of zeros makes the edge fall off where the box ends; roi_align alone would repeat the last cell.
        cells = F.pad(masks.float() / 255, (_BORDER_CELLS,) * 4)[:, None]
        frame = own[indices]
        per_px = masks.shape[-1] / (frame[:, 2:] - frame[:, :2]).clamp(min=1e-3)
        corners = boxes.to(frame).view(-1, 2, 2) - frame[:, None, :2]
        rois = (corners * per_px[:, None] + _BORDER_CELLS).flatten(1)
        rois = torch.cat((indices[:, None].to(rois), rois), 1)
        crops: Tensor = roi_align(cells, rois, out_shape, sampling_ratio=_SAMPLES_PER_CELL, aligned=True)
        return crops[:, 0]
