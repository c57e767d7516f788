"""Evaluating converted weights in one process."""

from __future__ import annotations

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
    batches = task.val_batches()
    console = Console(stderr=True)
    for batch in track(batches, "evaluating", console=console, transient=True, total=task.num_val_batches()):
        moved = batch.to(device)
        metric.update(moved, model.predict(moved))
    if detections_out is not None:
        metric.write_results(detections_out)
    return metric.compute()
