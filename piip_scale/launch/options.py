"""The options of a batch job: which ones a user may set, which ones follow from the run, and how they are written."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping

from piip_scale.errors import ConfigError
from piip_scale.world import outside_of_job, plain_environment

OptionValue = str | int | bool
"""True stands for a flag; False for one that is left out although a profile has it."""

ALLOWED = (
    *("account", "acctg-freq", "batch", "bb", "bbf", "begin", "burst-buffer", "cluster-constraint"),
    *("comment", "constraint", "container", "container-id", "contiguous", "core-spec", "cores-per-socket", "cpu-freq"),
    *("cpus-per-gpu", "cpus-per-task", "deadline", "delay-boot", "dependency", "distribution", "exclude", "exclusive"),
    *("export-file", "extra", "extra-node-info", "gid", "gpu-bind", "gpu-freq", "gpus", "gpus-per-socket"),
    *("gres-flags", "hint", "hold", "ignore-pbs", "input", "kill-on-invalid-dep", "licenses", "mail-type"),
    *("mail-user", "mcs-label", "mem", "mem-bind", "mem-per-cpu", "mem-per-gpu", "mincpus", "network", "nice"),
    *("nodefile", "nodelist", "ntasks-per-core", "ntasks-per-gpu", "ntasks-per-socket", "oom-kill-step"),
    *("overcommit", "oversubscribe", "partition", "power", "prefer", "priority", "profile", "propagate", "qos"),
    *("reboot", "reservation", "resv-ports", "segment", "sockets-per-node", "spread-job", "spread-segments", "stepmgr"),
    *("switches", "thread-spec", "threads-per-core", "time", "time-min", "tmp", "tres-bind", "tres-per-job"),
    *("tres-per-node", "tres-per-socket", "tres-per-task", "uid", "use-min-nodes", "wait-all-nodes", "wckey"),
    # Of plugins that sites add to Slurm: pyxis, and uenv.
    *("container-image", "container-mounts", "container-name", "container-workdir", "environment", "uenv", "view"),
)
# What is asked of the first job alone: one that goes on later must not be held, or wait, once more.
FIRST_ONLY = ("hold", "begin", "dependency")
# Several spellings of one thing, of which the batch system takes one.
_ALTERNATIVES = (
    ("cpus-per-task", "cpus-per-gpu"),
    ("mem", "mem-per-cpu", "mem-per-gpu"),
    ("exclusive", "oversubscribe"),
    ("nodelist", "nodefile"),
)
# A site's plugins add names that no list has; Slurm itself refuses those it does not know. What looks like one of ours
# misspelt is refused here, with what was meant.
_OPTION_NAME, _MISSPELT = re.compile(r"[a-z][a-z0-9]+(?:-[a-z0-9]+)+|[a-z][a-z0-9]{2,}"), 0.75
# By the option, sbatch alone would go there, and no later command would find the job.
_ONE_CLUSTER = "SLURM_CLUSTERS, the variable: export SLURM_CLUSTERS=NAME, which all of Slurm's commands follow"
# What follows from the run, and so would contradict it.
_OURS = {
    "array": "--sweep",
    "cluster": _ONE_CLUSTER,
    "clusters": _ONE_CLUSTER,
    "chdir": "the folder you submit from",
    "error": "the run's directory",
    "export": "--profile, its [environment]",
    "get-user-env": "--profile, its setup",
    "gpus-per-node": "--gpus-per-node",
    "gpus-per-task": "--gpus-per-node",
    "gres": "--gpus-per-node, and gpu_request and gpu_type of a profile",
    "job-name": "--job-name",
    "no-kill": "--spares",
    "no-requeue": "--profile, its requeue",
    "nodes": "--nodes and --spares",
    "ntasks": "--nodes and --gpus-per-node",
    "ntasks-per-node": "--gpus-per-node",
    "open-mode": "nothing: a log is appended to",
    "output": "the run's directory",
    "parsable": "nothing",
    "requeue": "--profile, its requeue",
    "signal": "--profile, its signal_lead_s",
    "test-only": "--dry-run",
    "wrap": "nothing",
}
# Variables that many sites have their users set; others of sbatch's would override the script unseen.
_DEFAULTS = {
    "SBATCH_ACCOUNT": "account",
    "SBATCH_CONSTRAINT": "constraint",
    "SBATCH_PARTITION": "partition",
    "SBATCH_QOS": "qos",
    "SBATCH_RESERVATION": "reservation",
    "SBATCH_TIMELIMIT": "time",
    "SBATCH_WCKEY": "wckey",
}
_UNITS_S, _DAY_S = (3600, 60, 1), 86400
_PLAIN = re.compile(r"[A-Za-z0-9_@%+=:,./\[\]^-]+")


def check_options(options: Mapping[str, object], source: str) -> dict[str, OptionValue]:
    """The options as they may be written, or an error that names the valid ones.

    Args:
        options: Values by long name, without dashes.
        source: Where they come from, for errors.

    Raises:
        ConfigError: A name that the batch system has not, that follows from the run, or a value that is none.
    """
    checked: dict[str, OptionValue] = {}
    for name, value in options.items():
        if name in _OURS:
            raise ConfigError(f"{source}: option {name}", rule=f"it follows from {_OURS[name]}", fix="leave it out")
        if name not in ALLOWED and not _may_be_a_plugins(name):
            raise _unknown(name, source)
        if not isinstance(value, str | int) or (isinstance(value, str) and not _is_line(value)):
            raise ConfigError(
                f"{source}: option {name}", value=value, rule="a text of one line, a number, or true for a flag"
            )
        checked[name] = value
    return checked


def parse_options(texts: list[str], source: str) -> dict[str, OptionValue]:
    """Options from ``NAME=VALUE`` or ``NAME`` texts, checked.

    Raises:
        ConfigError: As ``check_options``.
    """
    pairs = (text.removeprefix("--").partition("=") for text in texts)
    return check_options({name: value if sign else True for name, sign, value in pairs}, source)


def option_lines(options: Mapping[str, OptionValue]) -> list[str]:
    """The lines of a batch script that set the options, in their order."""
    lines = []
    for name, value in options.items():
        if value is True:
            lines.append(f"#SBATCH --{name}")
        elif value is not False:
            lines.append(f"#SBATCH --{name}={option_value(str(value))}")
    return lines


def option_value(text: str) -> str:
    """A value as the batch system reads it back; seen on Slurm 22.05, whose quotes are not the shell's."""
    if _PLAIN.fullmatch(text):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def time_limit_s(text: str) -> int | None:
    """Seconds of a time limit as sbatch reads it; ``None`` for one without end, or that it has to judge itself.

    Its forms are minutes, minutes:seconds, hours:minutes:seconds, and days-hours with or without :minutes:seconds.
    """
    days, dash, clock = text.rpartition("-")
    parts = clock.split(":")
    if not all(part.isdecimal() for part in [*parts, *([days] if dash else [])]) or len(parts) > len(_UNITS_S):
        return None
    # Alone or in two parts, without days, the first are minutes.
    first = 1 if dash or len(parts) == len(_UNITS_S) else 2
    units = _UNITS_S[first - 1 : first - 1 + len(parts)]
    return int(days or 0) * _DAY_S + sum(int(part) * unit for part, unit in zip(parts, units, strict=True))


def options_of_environment(environment: Mapping[str, str]) -> dict[str, OptionValue]:
    """Options that the submitting shell's variables stand for; they come last, and stand in the script."""
    return {name: environment[variable] for variable, name in _DEFAULTS.items() if environment.get(variable)}


def submitting_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables to submit with: none that would change what the script asks for, none of a job around this process."""
    plain = plain_environment(outside_of_job(environment))
    return {name: value for name, value in plain.items() if not name.startswith("SBATCH_")}


def merge_options(*sources: Mapping[str, OptionValue]) -> dict[str, OptionValue]:
    """The options of several sources, the last of which comes first; a later spelling of a thing replaces all others.

    Args:
        sources: Checked options: of the environment, of the profile, of the command line.
    """
    merged: dict[str, OptionValue] = {}
    for source in sources:
        for group in _ALTERNATIVES:
            if any(source.get(name, False) is not False for name in group):
                merged = {name: value for name, value in merged.items() if name not in group}
        merged |= source
    return merged


def first_only_words(options: Mapping[str, OptionValue]) -> list[str]:
    """Words of a command line that ask of one job what those after it must not inherit."""
    asked = {name: options[name] for name in FIRST_ONLY if options.get(name, False) is not False}
    return [f"--{name}" if value is True else f"--{name}={value}" for name, value in asked.items()]


def _may_be_a_plugins(name: str) -> bool:
    return bool(_OPTION_NAME.fullmatch(name)) and not difflib.get_close_matches(name, ALLOWED, n=1, cutoff=_MISSPELT)


def _unknown(name: str, source: str) -> ConfigError:
    near = difflib.get_close_matches(name, ALLOWED, n=3, cutoff=0.6)
    suggestion = f"did you mean {' or '.join(near)}? " if near else ""
    return ConfigError(f"{source}: unknown option {name}", rule=f"{suggestion}valid ones: {', '.join(ALLOWED)}")


def _is_line(text: str) -> bool:
    return bool(text) and text.isprintable()
