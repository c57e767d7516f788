"""Arguments that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ConfigPath = Annotated[Path, typer.Argument(help="Config file (Python), one of configs/ or a run's own config.py.")]
WeightsPath = Annotated[Path, typer.Argument(help="Weights, a .safetensors file that `piip-scale convert` wrote.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY.PATH=VALUE", help="Change one key of the config; may be given many times."),
]
