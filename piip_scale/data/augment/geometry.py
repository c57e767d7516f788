"""One affine map for a sample's image, points and boxes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from piip_scale.data.images import Image

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Window:
    """A part of the stored image, in whole pixels; ``right`` and ``bottom`` are just outside."""

    left: int
    top: int
    right: int
    bottom: int

    def cuts(self, boxes_xyxy_px: Array) -> Array:
        """Which boxes reach outside, bool (N,)."""
        low = boxes_xyxy_px[:, :2] < (self.left, self.top)
        high = boxes_xyxy_px[:, 2:] > (self.right, self.bottom)
        return np.asarray((low | high).any(axis=1))


@dataclass(frozen=True)
class Geometry:
    """How stored pixels become network input: cut a window, resize it, perhaps mirror it.

    The crop comes before the one resize, so that no pixel is scaled only to be thrown away. Coordinates are of pixel
    edges: a pixel i covers i to i + 1.

    Attributes:
        window: The part of the stored image that is kept.
        size_px: Height and width it is resized to.
        flip: Mirror left and right.
    """

    window: Window
    size_px: tuple[int, int]
    flip: bool = False

    @property
    def scale_xy(self) -> tuple[float, float]:
        """Resized over stored, for x and y."""
        width, height = self.window.right - self.window.left, self.window.bottom - self.window.top
        return self.size_px[1] / width, self.size_px[0] / height

    def cut(self, pixels: Image) -> tuple[Image, Geometry]:
        """The part of the stored image that is kept, and how it goes on from there."""
        part = pixels[self.window.top : self.window.bottom, self.window.left : self.window.right]
        return part, replace(self, window=Window(0, 0, part.shape[1], part.shape[0]))

    def image(self, pixels: Image) -> Image:
        """The new image, uint8 (H, W, 3)."""
        new = np.empty((*self.size_px, 3), np.uint8)
        self.draw(pixels, new)
        return new

    def draw(self, pixels: Image, into: Image) -> None:
        """Writes the new image to where it is wanted, uint8 (H, W, 3), which may be a part of an array.

        Whichever is smaller is mirrored, the stored pixels or the new ones.
        """
        part = pixels[self.window.top : self.window.bottom, self.window.left : self.window.right]
        size = self.size_px[::-1]
        if not self.flip:
            cv2.resize(part, size, dst=into, interpolation=cv2.INTER_LINEAR)
        elif part.size < into.size:
            cv2.resize(cv2.flip(part, 1), size, dst=into, interpolation=cv2.INTER_LINEAR)
        else:
            cv2.flip(cv2.resize(part, size, interpolation=cv2.INTER_LINEAR), 1, dst=into)

    def points(self, points_xy: Array) -> Array:
        """Points of the stored image in the new one, float64 (N, 2)."""
        moved = (points_xy - (self.window.left, self.window.top)) * self.scale_xy
        if self.flip:
            moved[:, 0] = self.size_px[1] - moved[:, 0]
        return np.asarray(moved)

    def boxes(self, boxes_xyxy_px: Array) -> Array:
        """Boxes cut to the new image, float64 (N, 4); one that lies outside comes out empty."""
        moved = self.points(boxes_xyxy_px.reshape(-1, 2)).reshape(-1, 4)
        if self.flip:
            moved = moved[:, [2, 1, 0, 3]]
        height, width = self.size_px
        return np.clip(moved, 0, (width, height, width, height))

    def stored_points(self, points_xy: Array) -> Array:
        """The way back: points of the new image in the stored one, float64 (N, 2)."""
        back = np.array(points_xy, np.float64)
        if self.flip:
            back[:, 0] = self.size_px[1] - back[:, 0]
        return np.asarray(back / self.scale_xy + (self.window.left, self.window.top))
