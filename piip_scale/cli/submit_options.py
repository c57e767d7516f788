"""What every command that sends a job to Slurm can be asked."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Annotated

import typer

from piip_scale.errors import ConfigError
from piip_scale.launch.options import OptionValue, check_options, merge_options, options_of_environment, parse_options
from piip_scale.launch.profiles import Profile, load_profile

GpusPerNode = Annotated[int, typer.Option(min=1, help="GPUs, and so ranks, of a node.")]
ProfileName = Annotated[
    str, typer.Option(metavar="NAME|FILE", help="The site's facts: a name in launch/profiles/, or a .toml file.")
]
Partition = Annotated[str, typer.Option(metavar="NAME")]
Account = Annotated[str, typer.Option(metavar="NAME")]
Qos = Annotated[str, typer.Option(metavar="NAME")]
Constraint = Annotated[str, typer.Option(metavar="FEATURES")]
NodeNames = Annotated[str, typer.Option(metavar="NODES")]
Reservation = Annotated[str, typer.Option(metavar="NAME")]
Dependency = Annotated[str, typer.Option(metavar="TYPE:JOB")]
CpusPerTask = Annotated[str, typer.Option(metavar="N", help="Cores of a rank and its loaders.")]
Memory = Annotated[str, typer.Option(metavar="SIZE", help="Host memory of a node.")]
FurtherOptions = Annotated[
    list[str] | None, typer.Option(metavar="NAME[=VALUE]", help="Any other option of sbatch; many times.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the script; write and send nothing.")]


def site_options(profile: str, texts: Sequence[str] | None, **named: str) -> tuple[Profile, dict[str, OptionValue]]:
    """A site's facts, and the command line's options before the profile's, and those before the environment's.

    Args:
        profile: The site's name or file; empty for none.
        texts: What ``--sbatch`` gave.
        named: Options that the command has of its own, by Slurm's names with underscores; empty ones were not given.

    Raises:
        ConfigError: There is no such profile, or an option cannot be meant.
    """
    site = load_profile(profile) if profile else Profile()
    chosen = {name.replace("_", "-"): value for name, value in named.items() if value}
    given = check_options(chosen, "command line") | parse_options(list(texts or ()), "--sbatch")
    return site, merge_options(options_of_environment(os.environ), site.sbatch, given)


def checked_job_name(name: str) -> str:
    """A job's name.

    Raises:
        ConfigError: It is not one line.
    """
    if not name.isprintable():
        raise ConfigError("--job-name", value=name, rule="one line of printable characters")
    return name
