"""``piip-scale count``: what a network weighs and costs, part by part."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from piip_scale.cli.options import ConfigPath, Overrides
from piip_scale.errors import ConfigError

if TYPE_CHECKING:
    from piip_scale.models.counting import PartCount

_MEGA, _GIGA = 1e6, 1e9


def register(app: typer.Typer) -> None:
    """Adds this module's command."""
    app.command()(count)


def count(
    config: ConfigPath,
    size: Annotated[str, typer.Option(metavar="HxW", help="Network input in px; default: the last branch's.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON with exact numbers.")] = False,
    overrides: Overrides = None,
) -> None:
    """Count a network's parameters and multiply-accumulates by part: branches, interactions, merging, pyramid.

    Builds no weights: the largest networks count in seconds on any machine. Neck and heads are the detector's and not
    counted.

    Example: `piip-scale count configs/demo/digits.py --size 800x1216`
    """
    from piip_scale.config.loading import load_config
    from piip_scale.models.counting import count_network

    network = load_config(Path(config), overrides or []).model
    height_px, width_px = _read_size(size) if size else (network.branches[-1].resolution_px,) * 2
    parts = count_network(network, height_px, width_px)
    if as_json:
        rows = [asdict(part) | {"total_macs": part.total_macs} for part in parts]
        typer.echo(json.dumps({"height_px": height_px, "width_px": width_px, "parts": rows}, indent=1))
    else:
        typer.echo(f"{height_px}x{width_px} px, one image")
        typer.echo("\n".join(_table(parts)))


def _table(parts: tuple[PartCount, ...]) -> list[str]:
    names = [part.name for part in parts] + ["total"]
    parameters = [part.parameters for part in parts]
    macs = [part.total_macs for part in parts]
    rows = zip(names, [*parameters, sum(parameters)], [*macs, sum(macs)], strict=True)
    head = f"{'part':<16}{'parameters (M)':>16}{'GMACs':>12}"
    return [head, *(f"{name:<16}{number / _MEGA:>16,.3f}{cost / _GIGA:>12,.3f}" for name, number, cost in rows)]


def _read_size(text: str) -> tuple[int, int]:
    sides = text.lower().split("x")
    if len(sides) != 2 or not all(side.isdigit() and int(side) for side in sides):
        raise ConfigError("--size", value=text, rule="height and width in px, as in 800x1216")
    return int(sides[0]), int(sides[1])
