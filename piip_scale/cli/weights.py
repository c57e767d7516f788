"""``piip-scale weights``: released weights in our form, and ours in theirs."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from piip_scale.cli.options import Averages, ChosenWeights, Overrides, Step
from piip_scale.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from torch import Tensor

app = typer.Typer(no_args_is_help=True, help="Bring released PIIP weights into this package's form, and back.")


@app.command("import")
def import_weights(
    file: Annotated[Path, typer.Argument(help="A released checkpoint, or a folder or index of its shards.")],
    out: Annotated[Path, typer.Option(help="The .safetensors file to write.")],
    config: Annotated[
        Path | None, typer.Option(help="Config of the same detector, segmentor or classifier here: takes it whole.")
    ] = None,
    backbone: Annotated[
        Path | None, typer.Option(help="model.backbone of its released config, as JSON: takes the network alone.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT where it exists.")] = False,
    overrides: Overrides = None,
) -> None:
    """Turn a released PIIP checkpoint into weights here, every key accounted for.

    With --config it is taken whole, and `evaluate` and `predict` take it with that config. A training starts from it by
    `model.pretrained="OUT"`, with other classes by `model.reset=["classes"]` as well.

    Example: `piip-scale weights import released.pth --config configs/coco/dino_h6b_1024_768.py --out whole.safetensors`
    """
    _check_target(out, (".safetensors",), overwrite)
    if (config is None) == (backbone is None):
        raise ConfigError("weights import", rule="it takes --config or --backbone, one of them")
    if config is not None:
        tensors, classes = _whole(file, config, overrides or [])
    else:
        assert backbone is not None
        tensors, classes = _network(file, backbone), ()
    _write(tensors, classes, out)
    of = f" of {len(classes)} classes" if classes else ""
    size = sum(tensor.numel() for tensor in tensors.values())
    typer.echo(f"{out}: {len(tensors)} tensors{of}, {size:,} parameters")


@app.command("export")
def export_weights(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG|RUN", help="Config file (Python), or the directory of a run.")
    ],
    weights: ChosenWeights = None,
    *,
    out: Annotated[Path, typer.Option(help="The .pth or .safetensors file to write.")],
    dtype: Annotated[Literal["fp32", "bf16"], typer.Option(help="Of the weights written.")] = "fp32",
    step: Step = None,
    ema: Averages = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT where it exists.")] = False,
    overrides: Overrides = None,
) -> None:
    """Write a trained model by the names of OpenGVLab's checkpoints, for the released code; import reads it back.

    Example: `piip-scale weights export runs/mine --out released.pth`
    """
    from piip_scale.tasks.released_export import SUFFIXES, export_released
    from piip_scale.tasks.trained import find_trained

    _check_target(out, SUFFIXES, overwrite)
    found = find_trained(config, weights, overrides=overrides or [], step=step, averaged=ema)
    shapes = export_released(found.config, found.weights, out, dtype)
    typer.echo(f"{out}: {len(shapes)} tensors, {sum(math.prod(shape) for shape in shapes.values()):,} parameters")


def _check_target(out: Path, suffixes: Sequence[str], overwrite: bool) -> None:
    if out.suffix not in suffixes:
        raise ModelError("--out", value=str(out), rule=f"it ends in {' or '.join(suffixes)}")
    if out.exists() and not overwrite:
        raise ModelError("weights are there already", value=str(out), fix="name another file, or add --overwrite")


def _whole(file: Path, config: Path, overrides: list[str]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    from piip_scale.config import load_config
    from piip_scale.tasks.released_import import import_released

    found = import_released(load_config(config, overrides), file)
    return found.tensors, found.classes


def _network(file: Path, backbone: Path) -> dict[str, Tensor]:
    from piip_scale.models.official import from_official
    from piip_scale.models.pretrained import read_weights

    state: dict[str, Tensor] = from_official(_read_backbone(backbone), read_weights(file)).state_dict()
    return state


def _write(tensors: dict[str, Tensor], classes: tuple[str, ...], out: Path) -> None:
    """One tensor at a time: those of a file that is mapped need not fit into memory."""
    from piip_scale.checkpoint.tensor_file import write_tensors
    from piip_scale.files import disk_errors
    from piip_scale.models.whole_file import CLASSES

    entries = {name: (tuple(value.shape), value.dtype) for name, value in tensors.items()}
    metadata = {"format": "pt"} | ({CLASSES: json.dumps(classes)} if classes else {})
    part = out.with_name(f".{out.name}.part")
    with disk_errors(ModelError, f"write {out}"):
        write_tensors(part, entries, metadata, tensors.__getitem__)
        part.replace(out)


def _read_backbone(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError("released config cannot be read", value=str(path), rule=f"a JSON object: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError("released config", value=str(path), rule="it must be one JSON object, model.backbone")
    return found
