"""``piip-scale evaluate``: numbers of a trained model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from piip_scale.cli.options import Overrides
from piip_scale.cli.plain import plain
from piip_scale.text import printable

if TYPE_CHECKING:
    from rich.table import Table


def register(app: typer.Typer) -> None:
    """Adds this module's commands."""
    app.command()(evaluate)


def evaluate(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG|RUN", help="Config file (Python), or the directory of a run.")
    ],
    weights: Annotated[
        Path | None,
        typer.Argument(
            help="Weights: .safetensors, a folder of them, or a checkpoint; default: the run's newest checkpoint."
        ),
    ] = None,
    step: Annotated[int | None, typer.Option(min=0, help="The run's checkpoint of this step.")] = None,
    ema: Annotated[bool, typer.Option("--ema", help="The running averages of a run with train.ema_decay.")] = False,
    shards: Annotated[str | None, typer.Option(help="Shards to evaluate on; default: data.val_shards.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the metrics there, as JSON.")] = None,
    predictions: Annotated[
        Path | None,
        typer.Option(
            "--predictions",
            "--detections",
            help="Write what was found in every image there, as JSON (objects: COCO results).",
        ),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Measure a trained model on packed shards: average precision of a detector, accuracy of a classifier.

    A run's directory is enough: its own config, and its newest whole checkpoint, read without converting it.

    Example: `piip-scale evaluate runs/mine --shards shards/val`
    """
    from rich.console import Console

    from piip_scale.cli.evaluation import evaluate_weights
    from piip_scale.data.reading.files import write_bytes
    from piip_scale.tasks.absences import absences
    from piip_scale.tasks.trained import find_trained

    changes = list(overrides or [])
    if shards is not None:
        changes.append(f"data.val_shards={shards!r}")
    found = find_trained(config, weights, overrides=changes, step=step, averaged=ema)
    metrics = evaluate_weights(found, predictions)
    try:
        # Shown first: a place that cannot be written must not cost the evaluation.
        Console().print(metrics_table(metrics))
        for note in absences(metrics):
            typer.echo(printable(note))
    finally:
        # Nor a terminal that cannot show a class's name.
        if out is not None:
            write_bytes(out, f"{json.dumps(metrics, indent=2)}\n".encode())


def metrics_table(metrics: dict[str, float]) -> Table:
    """A detector's numbers as a table: one row per kind (box, mask), one column per measure; others line by line."""
    from rich.table import Table

    if "box_ap" not in metrics:
        table = Table("metric", "value")
        for name, value in metrics.items():
            table.add_row(plain(name), f"{value:.4f}")
        return table

    kinds = [kind for kind in ("box", "mask") if f"{kind}_ap" in metrics]
    measures = [name.removeprefix("box_") for name in metrics if name.startswith("box_ap")]
    table = Table(title="COCO average precision")
    table.add_column("")
    for measure in measures:
        table.add_column(measure.upper().replace("_", " "), justify="right")
    for kind in kinds:
        table.add_row(kind, *(f"{metrics[f'{kind}_{measure}']:.3f}" for measure in measures))
    return table
