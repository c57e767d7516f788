"""``piip-scale evaluate``: numbers of a trained model."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from piip_scale.cli.options import Averages, ChosenWeights, Devices, Overrides, Spread, Step, devices_asked
from piip_scale.cli.plain import plain
from piip_scale.errors import ConfigError, Interrupted
from piip_scale.text import printable
from piip_scale.world import World, read_world

if TYPE_CHECKING:
    from rich.table import Table


_SET = "The set, where it is not the config's own"


_SCORES = "Scores"
MOST_SCALE = 16


def register(app: typer.Typer) -> None:
    """Adds this module's commands."""
    app.command()(evaluate)


def evaluate(
    config: Annotated[
        Path | None, typer.Argument(metavar="CONFIG|RUN", help="Config file (Python), or the directory of a run.")
    ] = None,
    weights: ChosenWeights = None,
    step: Step = None,
    ema: Averages = False,
    precision: Annotated[Literal["fp32", "bf16"], typer.Option(help="Of the network; heads are fp32.")] = "fp32",
    scales: Annotated[
        str | None, typer.Option(metavar="0.75,1,1.25", help="Look at images at several scales, and merge.")
    ] = None,
    flip: Annotated[bool, typer.Option("--flip", help="Look at mirrored images too, and merge.")] = False,
    procs: Annotated[
        int | None, typer.Option("--procs", "--gpus", min=1, help="Processes on this machine that share the images.")
    ] = None,
    spread: Spread = False,
    devices: Devices = None,
    shards: Annotated[
        str | None, typer.Option(help="Shards to evaluate on; default: data.val_shards.", rich_help_panel=_SET)
    ] = None,
    coco: Annotated[
        Path | None, typer.Option(help="A COCO file, with --images, not packed.", rich_help_panel=_SET)
    ] = None,
    voc: Annotated[
        Path | None, typer.Option(help="A folder of Pascal VOC annotations, with --images.", rich_help_panel=_SET)
    ] = None,
    label_maps: Annotated[
        Path | None, typer.Option(help="A folder of label maps, with --images.", rich_help_panel=_SET)
    ] = None,
    image_folders: Annotated[
        Path | None, typer.Option(help="A folder with a folder of images for each class.", rich_help_panel=_SET)
    ] = None,
    images: Annotated[Path | None, typer.Option(help="The folder of images.", rich_help_panel=_SET)] = None,
    reduce_zero_label: Annotated[
        bool, typer.Option("--reduce-zero-label", help="0 is no class of label maps.", rich_help_panel=_SET)
    ] = False,
    skip_broken: Annotated[
        bool, typer.Option("--skip-broken", help="Leave out annotations that cannot be used.", rich_help_panel=_SET)
    ] = False,
    metric: Annotated[
        Literal["coco", "lvis", "voc"], typer.Option(help="Of objects.", rich_help_panel=_SCORES)
    ] = "coco",
    max_dets: Annotated[
        int | None,
        typer.Option(min=1, help="Objects of an image that count; default: 100, LVIS: 300.", rich_help_panel=_SCORES),
    ] = None,
    results: Annotated[
        Path | None,
        typer.Option(help="Score this COCO results file, without a model.", rich_help_panel=_SCORES),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="A folder for a page, metrics, predictions, classes and charts; or a .json for metrics."),
    ] = None,
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
    """Measure a trained model: average precision of a detector, IoU of a segmentor, accuracy of a classifier.

    A run's directory is enough: its own config, its newest whole checkpoint, read without converting it, and the shards
    of its config. Starts its processes itself, or is one rank where torchrun or srun started it.

    Example: `piip-scale evaluate runs/mine --shards shards/val --out scores/`
    """
    from piip_scale.cli.evaluation import Asked, Outputs, evaluate_model, score_file
    from piip_scale.cli.evaluation_set import SetOptions
    from piip_scale.config import load_config
    from piip_scale.tasks.detection.scoring import Scoring
    from piip_scale.tasks.views import Views

    chosen = SetOptions(coco, voc, label_maps, image_folders, images, reduce_zero_label, skip_broken)
    chosen.check(shards, of_results=results is not None)
    scoring = Scoring(metric, max_dets)
    metrics_file = out if out is None or out.suffix == ".json" else out / "metrics.json"
    outputs = Outputs(predictions, out if metrics_file != out else None)
    changes = _changes(overrides, shards)
    if results is not None:
        place = shards or (str(load_config(config, changes).data.val_shards) if config and not chosen.given else "")
        _report(score_file(results, chosen, place, outputs, scoring), metrics_file)
        return
    if config is None:
        raise ConfigError("no model is named", rule="evaluate CONFIG|RUN [WEIGHTS], or --results FILE")
    world = read_world()
    spread_over = devices_asked(spread, devices, max(procs or 1, world.num_ranks))
    if (procs or 1) > 1 and world.num_ranks == 1:
        _start(procs or 1)
    views = Views(_factors(scales), flip, scoring.most)
    scored = None if scoring == Scoring() else scoring
    asked = Asked(config, weights, step, ema, changes, chosen, precision, scored, views, spread_over)
    try:
        metrics = evaluate_model(asked, outputs, world)
    except KeyboardInterrupt:
        if world.is_main:
            raise
        # Rank 0 says that it was stopped.
        raise typer.Exit(Interrupted.exit_code) from None
    if world.is_main:
        _report(metrics, metrics_file)


def check_evaluation(values: Mapping[str, Any]) -> None:
    """Whether model and set of an evaluation are there and belong together; predicts nothing.

    Args:
        values: Of ``evaluate``'s parameters, by name.

    Raises:
        PiipError: One is absent, damaged, or not the other's.
    """
    from piip_scale.cli.evaluation import Asked
    from piip_scale.cli.evaluation_set import SetOptions
    from piip_scale.tasks.kinds import build_task

    chosen = SetOptions(**{field.name: values[field.name] for field in fields(SetOptions)})
    chosen.check(values["shards"])
    _factors(values["scales"])
    changes = _changes(values["overrides"], values["shards"])
    asked = Asked(values["config"], values["weights"], values["step"], values["ema"], changes, chosen)
    found, samples = asked.find()
    build_task(found.config, World(), val_set=samples)


def _changes(overrides: Sequence[str] | None, shards: str | None) -> tuple[str, ...]:
    """The overrides, and the shards where they are named."""
    return (*(overrides or ()), *([f"data.val_shards={shards!r}"] if shards is not None else ()))


def _factors(text: str | None) -> tuple[float, ...]:
    try:
        factors = tuple(float(part) for part in (text or "1").split(","))
    except ValueError:
        factors = ()
    if not factors or not all(0 < factor <= MOST_SCALE for factor in factors):
        raise ConfigError("--scales", value=text, rule=f"factors above 0, to {MOST_SCALE}, as in 0.75,1,1.25")
    return factors


def _start(num_procs: int) -> NoReturn:
    """The same command as ranks of this machine."""
    from piip_scale.engine.local_launch import launch_without_run

    command = [sys.executable, "-m", "piip_scale.cli.main", *sys.argv[1:]]
    raise typer.Exit(launch_without_run(num_procs, command))


def _report(metrics: dict[str, float], out: Path | None) -> None:
    from rich.console import Console

    from piip_scale.data.reading.files import write_bytes
    from piip_scale.tasks.absences import absences

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
    """A detector's numbers as a table: one row per measure, one column per kind (box, mask); others line by line."""
    from rich.table import Table

    if not any(name.startswith(("box_ap", "mask_ap")) for name in metrics):
        table = Table("metric", "value")
        for name, value in metrics.items():
            table.add_row(plain(name), f"{value:.4f}")
        return table

    kinds = [kind for kind in ("box", "mask") if any(name.startswith(f"{kind}_ap") for name in metrics)]
    prefix = f"{kinds[0]}_"
    measures = [name.removeprefix(prefix) for name in metrics if name.startswith((f"{prefix}ap", f"{prefix}ar"))]
    caption = "-1: no such objects in the set" if -1 in metrics.values() else None
    table = Table("", title="Average precision, recall", caption=caption, caption_justify="left")
    for kind in kinds:
        table.add_column(kind, justify="right")
    for measure in measures:
        shown = [metrics.get(f"{kind}_{measure}", math.nan) for kind in kinds]
        table.add_row(measure.upper().replace("_", " "), *("-1" if v == -1 else f"{v:.3f}" for v in shown))
    return table
