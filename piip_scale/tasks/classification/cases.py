"""How a classifier did on single images."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import PIL.Image

from piip_scale.data.images import Image
from piip_scale.tasks.cases import Case
from piip_scale.tasks.drawing import DrawingStyle, draw_names


def class_case(
    image_id: int, label: int, guesses: Sequence[int], probabilities: Sequence[float], classes: Sequence[str]
) -> Case:
    """A case: good where it is sure of the right class, bad where it is sure of another.

    Args:
        image_id: The image's.
        label: Its class.
        guesses: Best first.
        probabilities: Of them.
        classes: Names in label order.
    """
    is_right, sure = guesses[0] == label, probabilities[0]
    score = (1 + sure) / 2 if is_right else (1 - sure) / 2
    words = f"{classes[label]}, taken for {classes[guesses[0]]} ({sure:.2f})" if not is_right else f"right ({sure:.2f})"
    return Case(image_id, score, words, partial(draw_guesses, guesses, probabilities, classes))


def draw_guesses(
    guesses: Sequence[int], probabilities: Sequence[float], classes: Sequence[str], pixels: Image, style: DrawingStyle
) -> PIL.Image.Image:
    """An image with the best guesses and how sure they are.

    Args:
        guesses: Labels, best first.
        probabilities: Of them.
        classes: Names in label order.
        pixels: RGB, uint8 (H, W, 3).
        style: Sizes.
    """
    names = [(guess, f"{classes[guess]} {value:.2f}") for guess, value in zip(guesses, probabilities, strict=True)]
    return draw_names(pixels, names, style)
