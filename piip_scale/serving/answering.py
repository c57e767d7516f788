"""What a server answers to one image: what was found, how long it took, which branches it rests on."""

from __future__ import annotations

import base64
import time
from dataclasses import dataclass
from typing import Any

import torch

from piip_scale.data.augment.transforms import evaluation_geometry
from piip_scale.data.images import Image, decode_image, image_facts
from piip_scale.data.orientation import resolve_orientation
from piip_scale.errors import DataError
from piip_scale.serving.branch_shares import WHOLE, BranchShares
from piip_scale.serving.looking import Looker, Looking
from piip_scale.tasks.base import Detections
from piip_scale.tasks.drawing import DrawingStyle, png_bytes
from piip_scale.tasks.trained import Trained

_ANY_SIZE = 1 << 62


class TooLargeError(DataError):
    """A body or an image beyond what a server takes."""


@dataclass(frozen=True)
class Question:
    """What is asked of an image.

    Attributes:
        content: The image file.
        threshold: Objects of a lesser score are left out.
        with_branches: Say which branches findings rest on.
        with_picture: Answer a drawn picture too.
    """

    content: bytes
    threshold: float = 0.5
    with_branches: bool = False
    with_picture: bool = False


class Answering:
    """A trained model that answers questions, one at a time.

    Args:
        found: Config and weights.
        max_pixels: Images of more are refused before they are decoded.
        devices: That the model is spread over, as ``named_devices`` takes them.

    Attributes:
        about: What the server says of its model: ``task``, ``classes``, ``branches``.

    Raises:
        PiipError: The weights are absent, damaged, or do not fit.
    """

    def __init__(self, found: Trained, max_pixels: int, devices: str | None = None) -> None:
        self._max_pixels = max_pixels
        # Each task's config has its own.
        self._augment: Any = found.config.data.augment  # type: ignore[attr-defined]
        self._looker = Looker(found, Looking(0.0), devices)
        branches = [f"branch {n} ({b.kind}, {b.resolution_px} px)" for n, b in enumerate(found.config.model.branches)]
        self.about = {
            "task": found.config.task,
            "classes": list(self._looker.predictor.classes),
            "branches": branches,
            "step": found.step,
        }

    def answer(self, question: Question) -> dict[str, Any]:
        """Values for JSON.

        Raises:
            TooLargeError: The image has too many pixels.
            ImageError: It is damaged, or none.
        """
        started = time.perf_counter()
        pixels = self._decoded(question.content)
        found, shares = self._looked(pixels, question)
        predictor = self._looker.predictor
        answer = {"width_px": pixels.shape[1], "height_px": pixels.shape[0], **predictor.entry(found)}
        if shares is not None:
            answer["branch_shares"] = shares[0]
            for entry, share in zip(answer.get("objects", ()), shares[1:], strict=False):
                entry["branch_shares"] = share
        if question.with_picture:
            picture = png_bytes(predictor.draw(pixels, found, DrawingStyle.of_picture(pixels.shape[:2])))
            answer["picture_png"] = base64.b64encode(picture).decode("ascii")
        return answer | {"seconds": round(time.perf_counter() - started, 4)}

    def _decoded(self, content: bytes) -> Image:
        facts = image_facts(content, "that was sent", max_pixels=_ANY_SIZE)
        num_pixels = facts.stored_size_px[0] * facts.stored_size_px[1]
        if num_pixels > self._max_pixels:
            raise TooLargeError(f"the image has {num_pixels} pixels", rule=f"at most {self._max_pixels} are looked at")
        orientation = resolve_orientation(facts, "apply").number
        return decode_image(content, "that was sent", orientation=orientation, max_pixels=self._max_pixels)

    def _looked(self, pixels: Image, question: Question) -> tuple[Any, list[list[float]] | None]:
        if not question.with_branches:
            return self._kept(self._looker.look([pixels])[0], question), None
        with BranchShares(self._looker.model) as shares:
            found = self._kept(self._looker.look([pixels])[0], question)
        return found, shares.of([WHOLE, *self._regions(pixels, found)])

    def _kept(self, found: Any, question: Question) -> Any:
        return found.where(found.scores >= question.threshold) if isinstance(found, Detections) else found

    def _regions(self, pixels: Image, found: Any) -> list[tuple[float, float, float, float]]:
        """Objects' boxes as shares of the canvas that the network saw."""
        if not isinstance(found, Detections):
            return []
        geometry = evaluation_geometry((pixels.shape[0], pixels.shape[1]), self._augment)
        multiple = self._augment.pad_multiple_px
        canvas_hw = [-(-side // multiple) * multiple for side in geometry.size_px]
        scale = torch.tensor([geometry.scale_xy[0] / canvas_hw[1], geometry.scale_xy[1] / canvas_hw[0]]).repeat(2)
        return [tuple(box) for box in (found.boxes_xyxy_px * scale).tolist()]
