"""``piip-scale count``: what a network weighs and costs, part by part."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from piip_scale.cli.options import ConfigPath, Overrides, read_size

if TYPE_CHECKING:
    from piip_scale.models.counting import PartCount
    from piip_scale.tasks.counting import RunCount

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
    """Count a model's parameters and multiply-accumulates by part: branches, interactions, pyramid, neck, heads.

    For one image at evaluation; heads are counted with as many proposals and detections as the detector's test_cfg
    lets through. Builds no weights: the largest networks count in seconds on any machine.

    Example: `piip-scale count configs/demo/digits.py --size 800x1216`
    """
    from piip_scale.config.loading import load_config
    from piip_scale.tasks.counting import count_run

    run = load_config(Path(config), overrides or [])
    height_px, width_px = read_size(size) if size else (run.model.branches[-1].resolution_px,) * 2
    counted = count_run(run, height_px, width_px)
    if as_json:
        rows = [asdict(part) | {"total_macs": part.total_macs} for part in counted.parts]
        facts = {"height_px": height_px, "width_px": width_px} | asdict(counted) | {"parts": rows}
        typer.echo(json.dumps(facts, indent=1))
    else:
        typer.echo(f"{height_px}x{width_px} px, one image, {_classes(counted)}")
        typer.echo("\n".join(_table(counted.parts)))


def _classes(counted: RunCount) -> str:
    if not counted.assumed_set:
        return f"{counted.num_classes} classes"
    return f"{counted.num_classes} classes ({counted.assumed_set}'s: neither the config nor its shards name any)"


def _table(parts: tuple[PartCount, ...]) -> list[str]:
    parameters, macs = sum(part.parameters for part in parts), sum(part.total_macs for part in parts)
    rows = [(part.name, part.parameters, part.total_macs, part.note) for part in parts]
    rows.append(("total", parameters, macs, ""))
    head = f"{'part':<16}{'parameters (M)':>16}{'GMACs':>12}"
    lines = (f"{name:<16}{number / _MEGA:>16,.3f}{cost / _GIGA:>12,.3f}  {note}" for name, number, cost, note in rows)
    return [head, *(line.rstrip() for line in lines)]
