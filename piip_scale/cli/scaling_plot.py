"""The picture of ``piip-scale plan --sweep``: images a second by GPUs, beside the ideal."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from piip_scale.errors import DataError
from piip_scale.files import disk_errors

if TYPE_CHECKING:
    from piip_scale.engine.planning.scaling import Scaled, ScalingPoint

_SIZE_INCHES = (11.0, 4.6)
_DPI = 130
_BLUE, _ORANGE, _GREEN, _GREY = "#2b6cb0", "#dd6b20", "#2f855a", "#a0aec0"


def check_picture(path: Path) -> None:
    """Looks whether a picture can be written there, before there is one.

    Raises:
        DataError: It cannot.
    """
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.removeprefix(".") not in known or path.is_dir():
        raise DataError("--png", value=str(path), rule="a file whose name ends in .png, .svg or .pdf")
    if not os.access(path.parent, os.W_OK):
        raise DataError("--png", value=str(path), rule="its folder exists and can be written", fix="choose another")


def plot_scaling(points: Sequence[ScalingPoint], title: str, path: Path) -> None:
    """Writes the picture.

    Args:
        points: Of a run.
        title: What is planned, in a line.
        path: One that ``check_picture`` lets pass.

    Raises:
        DataError: It cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
    strong, weak = figure.subplots(1, 2)
    _panel(strong, "Strong scaling: steps of as many images", [(p.num_ranks, p.strong) for p in points if p.strong])
    _panel(weak, "Weak scaling: as many images on each GPU", [(p.num_ranks, p.weak) for p in points])
    figure.suptitle(title, fontsize=10)
    with disk_errors(DataError, f"write {path}"):
        figure.savefig(path, dpi=_DPI)


def _panel(axes: Any, title: str, scaled: Sequence[tuple[int, Scaled]]) -> None:
    ranks = [number for number, _ in scaled]
    fastest = [each.fastest.time.images_per_s for _, each in scaled]
    axes.plot(ranks, [fastest[0] * number / ranks[0] for number in ranks], "--", color=_GREY, label="ideal")
    kept = [(number, each.uncheckpointed.time.images_per_s) for number, each in scaled if each.uncheckpointed]
    if kept:
        axes.plot(*zip(*kept, strict=True), "s-", ms=5, color=_GREEN, label="fastest, nothing computed again")
    axes.plot(ranks, fastest, "o-", ms=5, color=_BLUE, label="fastest layout that fits")
    written = [each.written.time.images_per_s for _, each in scaled]
    axes.plot(ranks, written, "^-", ms=5, color=_ORANGE, label="layout as written")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(ranks, [str(number) for number in ranks])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("GPUs")
    axes.set_ylabel("images/s")
    axes.set_title(title, fontsize=11)
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize=8)
