"""``piip-scale predict``: from photographs to pictures and results."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from piip_scale.cli.options import Averages, Devices, Overrides, Spread, Step, TrainedPath, devices_asked
from piip_scale.errors import ConfigError, DataError
from piip_scale.text import printable

if TYPE_CHECKING:
    from piip_scale.tasks.result_files import Format

_WEIGHTS = ".safetensors"


def register(app: typer.Typer) -> None:
    """Adds this module's commands."""
    app.command()(predict)


def predict(
    config: TrainedPath,
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="[WEIGHTS] INPUT...",
            help=(
                "Weights, unless they are the run's newest checkpoint; then photographs, folders of them, patterns, "
                "videos, or - for a list of these on standard input."
            ),
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="A folder, for a picture an image and results; or one .png for all pictures.")
    ] = Path("detections.png"),
    formats: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="Results in the folder of --out: json (default), coco, csv, yolo, or several with commas between.",
        ),
    ] = None,
    pictures: Annotated[bool, typer.Option(help="Draw pictures into the folder of --out.")] = True,
    threshold: Annotated[
        float | None,
        typer.Option(
            "--threshold",
            "--score-threshold",
            min=0.0,
            max=1.0,
            help="Leave out what scores less; default: draw objects from 0.5 on and write all.",
        ),
    ] = None,
    classes: Annotated[str | None, typer.Option(help="Find these only; names with commas between.")] = None,
    tile: Annotated[
        int | None, typer.Option(min=1, help="Look at tiles of this side in px too, for images too large for one look.")
    ] = None,
    overlap: Annotated[float, typer.Option(help="Share of a tile that the next one repeats.")] = 0.2,
    batch: Annotated[int, typer.Option(min=1, help="Look at so many images, or tiles, together.")] = 1,
    every: Annotated[int, typer.Option(min=1, help="Of a video, one frame in so many.")] = 1,
    json_out: Annotated[Path | None, typer.Option("--json", help="Beside one .png: all that was found.")] = None,
    coco_ids: Annotated[
        Path | None, typer.Option(help="For --format coco: the annotations whose image and category ids are meant.")
    ] = None,
    exif: Annotated[
        Literal["apply", "stored"],
        typer.Option(help="Turn photographs as their EXIF data say, or not."),
    ] = "apply",
    max_pixels: Annotated[
        int | None,
        typer.Option(min=1, help="Refuse photographs of more; default: data.max_pixels."),
    ] = None,
    spread: Spread = False,
    devices: Devices = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what --out and --json name.")] = False,
    step: Step = None,
    ema: Averages = False,
    overrides: Overrides = None,
) -> None:
    """Find objects in photographs, or the classes of photographs, draw them and write them down.

    Images that cannot be read are reported and passed by; the exit code is then 1, or 2 where none could be read.

    Example: `piip-scale predict runs/mine photos/ --out found/ --format coco`
    """
    from piip_scale.cli.prediction import predict_photos
    from piip_scale.cli.prediction_outputs import Sheet, check_target, is_sheet, open_folder
    from piip_scale.data.photos import Reading, find_photos
    from piip_scale.serving.looking import Looker, Looking
    from piip_scale.tasks.detection.tiling import Tiling
    from piip_scale.tasks.trained import find_trained

    spread_over = devices_asked(spread, devices)
    check_target(out, json_out, overwrite=overwrite)
    if is_sheet(out) and formats:
        raise DataError("--format", value=formats, rule="results go into a folder", fix="name one with --out DIR")
    weights, words = split_words(config, inputs)
    found = find_trained(config, weights, overrides=overrides or [], step=step, averaged=ema)
    chosen = tuple(_parts(classes or ""))
    looking = Looking(threshold, chosen, Tiling(tile, overlap) if tile else None, batch)
    looker = Looker(found, looking, spread_over)
    reading = Reading(exif, max_pixels or found.config.data.max_pixels, every)
    outputs = (
        Sheet(out, looker.predictor, json_out, _report)
        if is_sheet(out)
        else open_folder(
            out,
            looker.predictor,
            _formats(formats or "json"),
            is_detector=looker.is_detector,
            coco_ids=coco_ids,
            pictures=pictures,
            report=_report,
        )
    )
    predict_photos(looker, find_photos(words, reading, sys.stdin), outputs, batch, _complain).check()


def split_words(source: Path, words: Sequence[str]) -> tuple[Path | None, list[str]]:
    """Weights, where the first word names some, and the inputs. A config file has none of its own, so they come first.

    Raises:
        ConfigError: No input is left.
    """
    from piip_scale.tasks.trained import holds_weights

    first = Path(words[0])
    has_weights = not source.is_dir() or first.suffix == _WEIGHTS or holds_weights(first)
    inputs = list(words[has_weights:])
    if not inputs:
        raise ConfigError(
            "no photographs are named",
            rule="they come after the weights" if has_weights else "",
            fix="give files, folders, patterns, or - for a list on standard input",
        )
    return (first if has_weights else None), inputs


def _formats(text: str) -> list[Format]:
    from piip_scale.tasks.result_files import FORMATS

    chosen = [known for part in _parts(text) for known in FORMATS if known == part]
    if len(chosen) != len(_parts(text)):
        raise DataError("--format", value=text, rule=f"some of {', '.join(FORMATS)}, with commas between")
    return chosen


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _report(line: str) -> None:
    typer.echo(printable(line))


def _complain(line: str) -> None:
    typer.echo(printable(f"piip-scale: {line}"), err=True)
