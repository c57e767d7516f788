"""Evaluating a trained model in one process."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from piip_scale.world import World

if TYPE_CHECKING:
    from piip_scale.tasks.base import TrainableModel
    from piip_scale.tasks.trained import Trained


def evaluate_weights(found: Trained, predictions_out: Path | None = None) -> dict[str, float]:
    """The task's metrics of a trained model over ``data.val_shards``.

    Args:
        found: Config and weights.
        predictions_out: Where to write what was found in every image, detections in COCO's result format; ``None`` to
            keep it.

    Raises:
        PiipError: Shards or weights are absent, damaged, or do not fit the config.
    """
    from rich.console import Console
    from rich.progress import track

    from piip_scale.engine.fp32_precision import apply_fp32_precision
    from piip_scale.tasks.kinds import build_task

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    apply_fp32_precision(found.config.train)
    task = build_task(found.config, World())
    model = cast("TrainableModel", found.load(device=device))
    metric = task.build_metric()
    console = Console(stderr=True)
    bar = partial(track, console=console, transient=True, disable=not console.is_terminal)
    for batch in bar(task.val_batches(), "evaluating", task.num_val_batches()):
        moved = batch.to(device)
        metric.update(moved, model.predict(moved))
    if predictions_out is not None:
        metric.write_results(predictions_out)
    return metric.compute()
