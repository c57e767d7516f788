"""``piip-scale demo``: from nothing to pictures, by the same functions as the other commands."""

from __future__ import annotations

import json
import shlex
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from piip_scale.cli.pack_options import describe
from piip_scale.cli.plain import plain
from piip_scale.cli.progress import progress_bar
from piip_scale.cli.train import run_training
from piip_scale.config import load_config
from piip_scale.config.loading import config_text
from piip_scale.errors import ConfigError, DataError, RunError

if TYPE_CHECKING:
    from piip_scale.data.reading.manifest import Manifest

NUM_PROCS = 2
NUM_PICTURES = 4
SCENES = {"num_train": 1600, "num_val": 160, "size_px": 128, "seed": 0}
VAL_SHARE = 0.2
T = TypeVar("T")

_CONFIGS = Path(__file__).parents[2] / "configs" / "demo"


def register(app: typer.Typer) -> None:
    """Adds this module's commands."""
    app.command()(demo)


@dataclass(frozen=True)
class CocoPair:
    """A data set as two COCO files over one folder of images."""

    train: Path
    val: Path
    images: Path


@dataclass(frozen=True)
class Demo:
    """Where a demo keeps its things; every step reuses what an earlier demo left whole."""

    folder: Path

    @property
    def run_dir(self) -> Path:
        """The training's run directory."""
        return self.folder / "run"

    @property
    def weights(self) -> Path:
        """The converted weights."""
        return self.folder / "weights.safetensors"

    @property
    def metrics(self) -> Path:
        """COCO metrics of the weights."""
        return self.folder / "metrics.json"

    @property
    def picture(self) -> Path:
        """Detections on validation images."""
        return self.folder / "detections.png"

    def shards(self, split: str) -> Path:
        """The packed ``train`` or ``val`` set."""
        return self.folder / "shards" / split


def demo(
    data: Annotated[
        Path | None,
        typer.Option(help="Your own COCO JSON, or a folder with instances_train.json and instances_val.json."),
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of its images; default: images/ beside the JSON.")] = None,
    boxes_only: Annotated[bool, typer.Option("--boxes-only", help="Leave masks out.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for everything; default: runs/demo[-NAME].")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY.PATH=VALUE", help="Change one key of the demo's config.")
    ] = None,
) -> None:
    """Prepare data, pack it, train on two processes, convert, evaluate and draw, in ten minutes on two cores.

    Without --data it makes its own data set: handwritten digits on photographs. A second call reuses what stands.
    """
    started = time.monotonic()
    paths = Demo(out or Path("runs") / (f"demo-{data.resolve().stem}" if data else "demo"))
    pair = _step("1/6 data", lambda: _own_scenes(paths) if data is None else _user_data(data, images, paths))
    train_set, val_set = _step("2/6 shards", lambda: _pack(pair, paths, boxes_only=boxes_only))
    config = _config_of(data, train_set)
    _step("3/6 training", lambda: _train(config, paths, list(overrides or [])))
    _step("4/6 weights", lambda: _convert(paths))
    metrics = _step("5/6 evaluation", lambda: _evaluate(paths))
    _step("6/6 picture", lambda: _draw(pair, paths))
    _report(paths, (train_set, val_set), metrics, time.monotonic() - started)


def _step(title: str, action: Callable[[], T]) -> T:
    """Runs one step between its title and its time."""
    typer.secho(f"[{title}]", bold=True)
    started = time.monotonic()
    result = action()
    typer.echo(f"      {time.monotonic() - started:.0f} s")
    return result


def _own_scenes(paths: Demo) -> CocoPair:
    from piip_scale.demo.scenes import write_scenes

    made = write_scenes(paths.folder / "data", **SCENES)
    typer.echo(
        f"      {SCENES['num_train']} + {SCENES['num_val']} scenes of handwritten digits in {made.images.parent}"
    )
    return CocoPair(made.train, made.val, made.images)


def _user_data(data: Path, images: Path | None, paths: Demo) -> CocoPair:
    """The user's own split where there is one, else 80/20 by image."""
    from piip_scale.data.packing.coco import split_coco

    if data.is_dir():
        return CocoPair(data / "instances_train.json", data / "instances_val.json", images or data / "images")
    if not data.is_file():
        rule = "a COCO JSON file, or a folder with instances_train.json and instances_val.json"
        raise DataError("--data", value=str(data), rule=rule, fix="check the path")
    train, val = split_coco(data, paths.folder / "data", val_share=VAL_SHARE)
    return CocoPair(train, val, images or data.parent / "images")


def _pack(pair: CocoPair, paths: Demo, *, boxes_only: bool) -> tuple[Manifest, Manifest]:
    from piip_scale.data.packing.pack import pack_coco

    manifests = []
    for split, source in (("train", pair.train), ("val", pair.val)):
        with progress_bar(f"packing {source.name}") as on_progress:
            out = paths.shards(split)
            made = pack_coco(source, pair.images, out, clip_boxes=True, boxes_only=boxes_only, on_progress=on_progress)
        typer.echo(f"      {split}: {describe(made)}")
        manifests.append(made)
    return manifests[0], manifests[1]


def _config_of(data: Path | None, train_set: Manifest) -> Path:
    name = "digits.py" if data is None else "masks.py" if train_set.has_masks else "boxes.py"
    if not (_CONFIGS / name).is_file():
        raise ConfigError("the demo's config is not there", value=str(_CONFIGS / name), fix="run it from a checkout")
    return _CONFIGS / name


def _train(config: Path, paths: Demo, overrides: list[str]) -> None:
    from piip_scale.data.reading.opened import OpenedSets
    from piip_scale.run.run_dir import RunDirectory
    from piip_scale.tasks.classes import with_classes

    overrides = [f"data.{split}_shards={str(paths.shards(split))!r}" for split in ("train", "val")] + overrides
    run, sets = RunDirectory(paths.run_dir), OpenedSets()
    status = run.status()
    if status is not None:
        wanted = config_text(with_classes(load_config(config, overrides), sets))
        if run.config.read_text(encoding="utf-8") != wanted:
            raise RunError(f"{paths.run_dir} holds a run of another config", fix="delete it, or choose another --out")
        if status.state == "done":
            typer.echo(f"      done before, {status.step} steps")
            return
        typer.echo(f"      continuing a run that {status.state} at step {status.step}")
    resume = status is not None
    code = run_training(config, overrides, paths.run_dir, procs=NUM_PROCS, resume=resume, sets=sets)
    if code:
        # The ranks have reported why.
        raise typer.Exit(code)


def _convert(paths: Demo) -> None:
    from piip_scale.checkpoint.convert import ConvertOptions, convert

    if _is_newer(paths.weights, paths.run_dir / "status.json"):
        typer.echo(f"      {paths.weights} stands")
        return
    report = convert(paths.run_dir, paths.weights, ConvertOptions(overwrite=True))
    typer.echo(f"      {paths.weights}: {report.num_parameters:,} parameters, {report.num_bytes / 1e6:.1f} MB")


def _evaluate(paths: Demo) -> dict[str, float]:
    from piip_scale.cli.evaluation import Asked, evaluate_model
    from piip_scale.data.reading.files import write_bytes

    if not _is_newer(paths.metrics, paths.weights):
        metrics = evaluate_model(Asked(paths.run_dir / "config.py", paths.weights))
        write_bytes(paths.metrics, f"{json.dumps(metrics, indent=2)}\n".encode())
    measured: dict[str, float] = json.loads(paths.metrics.read_text(encoding="utf-8"))
    return measured


def _draw(pair: CocoPair, paths: Demo) -> None:
    from piip_scale.cli.prediction import predict_photos
    from piip_scale.cli.prediction_outputs import Sheet
    from piip_scale.data.packing.coco import load_coco_json
    from piip_scale.data.photos import Reading, find_photos
    from piip_scale.serving.looking import Looker, Looking
    from piip_scale.tasks.trained import find_trained

    entries = load_coco_json(pair.val)["images"][:NUM_PICTURES]
    photos = [pair.images / entry["file_name"] for entry in entries]
    looker = Looker(find_trained(paths.run_dir / "config.py", paths.weights), Looking())
    sheet = Sheet(paths.picture, looker.predictor, None, report=lambda line: None)
    predict_photos(looker, find_photos(map(str, photos), Reading()), sheet, 1, typer.echo).check()
    typer.echo(f"      {len(photos)} validation images: {paths.picture}")


def _is_newer(path: Path, source: Path) -> bool:
    return path.is_file() and path.stat().st_mtime >= source.stat().st_mtime


def _report(paths: Demo, sets: Sequence[Manifest], metrics: dict[str, float], seconds: float) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"piip_scale demo, {seconds / 60:.1f} min", show_header=False)
    for row in _rows(paths, sets, metrics):
        table.add_row(*map(plain, row))
    console = Console()
    console.print(table)
    console.print("\nThree commands to try next:", highlight=False)
    for line in _next_commands(paths):
        console.print(f"  {line}", highlight=False, soft_wrap=True, markup=False)


def _rows(paths: Demo, sets: Sequence[Manifest], metrics: dict[str, float]) -> list[tuple[str, str]]:
    rows = [("images", f"{sets[0].num_samples} to train, {sets[1].num_samples} held out")]
    logged = _logged_steps(paths)
    rate = statistics.median(line["throughput/images_per_second"] for line in logged)
    rows.append(("training", f"{logged[-1]['step']} steps, median {rate:.1f} images/s on {NUM_PROCS} processes"))
    rows.append(("total loss", f"{logged[0]['loss/total']:.2f} -> {logged[-1]['loss/total']:.2f}"))
    for kind in ("box", "mask"):
        if f"{kind}_ap" in metrics:
            rows.append((f"{kind} AP / AP50", f"{metrics[f'{kind}_ap']:.3f} / {metrics[f'{kind}_ap50']:.3f}"))
    return [*rows, ("weights", str(paths.weights)), ("picture", str(paths.picture))]


def _logged_steps(paths: Demo) -> list[dict[str, float]]:
    lines = (paths.run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [entry for entry in map(json.loads, lines) if entry["kind"] == "step"]


def _next_commands(paths: Demo) -> list[str]:
    run = f"{shlex.quote(str(paths.run_dir / 'config.py'))} {shlex.quote(str(paths.weights))}"
    return [
        f".venv/bin/tensorboard --logdir {shlex.quote(str(paths.run_dir / 'tensorboard'))}",
        f".venv/bin/piip-scale predict {run} YOUR_PHOTO.jpg --out out.png",
        "make demo DATA=/path/to/instances.json IMAGES=/path/to/images",
    ]
