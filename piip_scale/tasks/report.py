"""More than an evaluation's numbers: a table of classes, curves, and what is taken for what."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from piip_scale.data.reading.files import write_bytes
from piip_scale.tasks.charts import draw_confusion, draw_curves
from piip_scale.tasks.drawing import png_bytes

if TYPE_CHECKING:
    from piip_scale.tasks.cases import Case
    from piip_scale.tasks.detection.error_kinds import ErrorKinds


@dataclass(frozen=True)
class Report:
    """What a metric knows of each class.

    Attributes:
        classes: Names in label order.
        columns: Of the table of classes, by heading; a value for each class.
        confusion: How often each of ``names`` (row) was taken for each (column), int64.
        names: The classes, and what else there is beside them.
        confusion_title: What is counted.
        curves: Precision at an IoU of 0.5 by rising recall, (R, K) in label order, by what is scored.
        errors: Why detections are wrong, likewise.
        cases: How single images went; all of them, or the best and the worst.
    """

    classes: Sequence[str]
    columns: Mapping[str, Sequence[float]]
    confusion: npt.NDArray[np.int64]
    names: Sequence[str]
    confusion_title: str
    curves: Mapping[str, npt.NDArray[np.float64]] = field(default_factory=dict)
    errors: Mapping[str, ErrorKinds] = field(default_factory=dict)
    cases: Sequence[Case] = ()

    def write(self, folder: Path) -> list[Path]:
        """Writes ``per_class.csv``, ``confusion.png`` and a ``pr_curve_*.png`` for each curve; returns their paths.

        Raises:
            DataError: The disk is full, or the folder cannot be written.
        """
        files = {"per_class.csv": self._table()}
        files["confusion.png"] = png_bytes(draw_confusion(self.confusion, self.names, self.confusion_title))
        for part, precision in self.curves.items():
            picture = draw_curves(precision, self.classes, f"Precision by recall at an IoU of 0.5 ({part})")
            files[f"pr_curve_{part}.png"] = png_bytes(picture)
        for name, content in files.items():
            write_bytes(folder / name, content)
        return [folder / name for name in files]

    def _table(self) -> bytes:
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow(["class", *self.columns])
        rows.writerows(zip(self.classes, *self.columns.values(), strict=True))
        return text.getvalue().encode("utf-8", "backslashreplace")
