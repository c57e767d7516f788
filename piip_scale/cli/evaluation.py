"""Evaluating converted weights in one process."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from piip_scale.config import RunConfig
from piip_scale.world import World


def evaluate_weights(config: RunConfig, weights: Path, detections_out: Path | None = None) -> dict[str, float]:
    """COCO metrics of a weights file over ``data.val_shards``.

    Args:
        config: The run's config.
        weights: A safetensors file.
        detections_out: Where to write all detections in COCO's result format; ``None`` to keep them.

    Raises:
        PiipError: Shards or weights are absent, damaged, or do not fit the config.
    """
    from rich.console import Console
    from rich.progress import track

    from piip_scale.tasks.detection import DetectionTask, load_detector

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    task = DetectionTask(config, World())
    model = load_detector(config, weights).to(device)
    metric = task.build_metric()
    console = Console(stderr=True)
    bar = partial(track, console=console, transient=True, disable=not console.is_terminal)
    for batch in bar(task.val_batches(), "evaluating", task.num_val_batches()):
        moved = batch.to(device)
        metric.update(moved, model.predict(moved))
    if detections_out is not None:
        metric.write_results(detections_out)
    return metric.compute()
