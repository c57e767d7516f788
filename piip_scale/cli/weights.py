"""``piip-scale weights``: released weights in our form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from piip_scale.errors import ConfigError, ModelError

app = typer.Typer(no_args_is_help=True, help="Bring released PIIP weights into this package's form.")


@app.command("import")
def import_weights(
    file: Annotated[Path, typer.Argument(help="A released checkpoint, or a folder or index of its shards.")],
    backbone: Annotated[Path, typer.Option(help="model.backbone of its released config, as JSON.")],
    out: Annotated[Path, typer.Option(help="The .safetensors file to write.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT where it exists.")] = False,
) -> None:
    """Turn a released PIIP checkpoint into the weights of a network here, every key accounted for.

    A detector's neck and heads are left behind; a classifier is whole, and `evaluate` and `predict` take it. The config
    to train it on says `model.pretrained="F.safetensors"`.

    Example: `piip-scale weights import released.pth --backbone backbone.json --out network.safetensors`
    """
    from safetensors.torch import save_file

    from piip_scale.models.official import from_official
    from piip_scale.models.pretrained import read_weights

    if out.exists() and not overwrite:
        raise ModelError("weights are there already", value=str(out), fix="name another file, or add --overwrite")
    model = from_official(_read_backbone(backbone), read_weights(file))
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    part = out.with_name(f".{out.name}.part")
    save_file(tensors, part, metadata={"format": "pt"})
    part.replace(out)
    typer.echo(f"{out}: {len(tensors)} tensors, {sum(tensor.numel() for tensor in tensors.values()):,} parameters")


def _read_backbone(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError("released config cannot be read", value=str(path), rule=f"a JSON object: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError("released config", value=str(path), rule="it must be one JSON object, model.backbone")
    return found
