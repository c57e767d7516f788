"""Arguments that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from piip_scale.errors import ConfigError, WorldError

ConfigPath = Annotated[Path, typer.Argument(help="Config file (Python), one of configs/ or a run's own config.py.")]
WeightsPath = Annotated[Path, typer.Argument(help="Weights, a .safetensors file that `piip-scale convert` wrote.")]
TrainedPath = Annotated[
    Path,
    typer.Argument(metavar="CONFIG|RUN", help="Config file (Python), the directory of a run, or of an exported model."),
]
ChosenWeights = Annotated[
    Path | None,
    typer.Argument(
        help="Weights: .safetensors, a folder of them, or a checkpoint; default: the run's newest checkpoint."
    ),
]
Step = Annotated[int | None, typer.Option("--step", min=0, help="The run's checkpoint of this step.")]
Averages = Annotated[bool, typer.Option("--ema", help="The running averages of a run with train.ema_decay.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY.PATH=VALUE", help="Change one key of the config; may be given many times."),
]

Spread = Annotated[
    bool, typer.Option("--spread", help="Put parts of the model on all GPUs: it may be too large for one.")
]
Devices = Annotated[
    str | None,
    typer.Option(metavar="cuda:0,cuda:1,cpu", help="Put parts of the model on these, in the order of their use."),
]


def devices_asked(spread: bool, devices: str | None, num_procs: int = 1) -> str | None:
    """What ``--spread`` and ``--devices`` ask for, as ``named_devices`` takes it; ``None`` for neither.

    Args:
        spread: ``--spread``.
        devices: ``--devices``.
        num_procs: Processes that share the images.

    Raises:
        WorldError: They are several.
    """
    asked = "all" if spread and devices is None else devices
    if asked is not None and num_procs > 1:
        raise WorldError(
            "--spread" if spread else "--devices",
            value=f"{num_procs} processes",
            rule="one process spreads one model; several have a whole one each",
            fix="leave it out, or start one process (no --procs, torchrun or srun)",
        )
    return asked


def read_size(text: str, option: str = "--size") -> tuple[int, int]:
    """Height and width in px from a text such as ``800x1216``.

    Raises:
        ConfigError: It reads otherwise.
    """
    sides = text.lower().split("x")
    if len(sides) != 2 or not all(side.isdigit() and int(side) for side in sides):
        raise ConfigError(option, value=text, rule="height and width in px, as in 800x1216")
    return int(sides[0]), int(sides[1])


def read_numbers(text: str, option: str = "--sweep") -> list[int]:
    """Rising numbers from a text such as ``1,2,4``.

    Raises:
        ConfigError: It reads otherwise.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdigit() and int(word) for word in words):
        raise ConfigError(option, value=text, rule="numbers of at least 1 with commas between, as in 1,2,4")
    return sorted({int(word) for word in words})
