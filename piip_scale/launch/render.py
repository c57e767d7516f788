"""The batch script of a job: one of launch/*.sbatch with its marked sections filled in. Pure functions."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from piip_scale.errors import RunError
from piip_scale.launch.options import FIRST_ONLY, OptionValue, option_lines
from piip_scale.launch.profiles import Profile
from piip_scale.launch.spec import JobSpec, entry_command

_SECTION = re.compile(r"^# \[(\w+)\]\n(.*?)^# \[/\1\]\n", re.MULTILINE | re.DOTALL)
_REFERENCE = re.compile(r"\$\{[A-Za-z_][A-Za-z0-9_]*\}")


def render_script(
    template: str,
    specs: Sequence[JobSpec],
    profile: Profile,
    options: Mapping[str, OptionValue],
    array_limit: str = "",
) -> str:
    """The script that runs one spec, or the several of a sweep as tasks of an array.

    Args:
        template: Text of launch/train.sbatch.
        specs: They differ in their runs only.
        profile: The site.
        options: What the user and the site ask of the job beyond what follows from the spec.
        array_limit: ``%N``: so many of a sweep's runs at once.

    Raises:
        RunError: The template lacks a section.
    """
    sections = {
        "options": option_lines(job_options(specs, profile, options, array_limit)),
        "site": [*_profile_lines(specs[0], profile), *site_lines(profile)],
        "run": [*_command_lines(specs), *_argument_lines(specs)],
    }
    return fill_sections(template, sections)


def render_evaluation(
    template: str, spec: JobSpec, profile: Profile, options: Mapping[str, OptionValue], words: Sequence[str]
) -> str:
    """The script that evaluates.

    Args:
        template: Text of launch/evaluate.sbatch.
        spec: The job, with frozen code.
        profile: The site.
        options: What the user and the site ask of the job beyond what follows from the spec.
        words: Arguments of ``evaluate``.

    Raises:
        RunError: The template lacks a section.
    """
    assert spec.code_dir is not None
    command = [spec.python, *entry_command(spec.code_dir), "evaluate-ranks"]
    sections = {
        "options": option_lines(job_options([spec], profile, options)),
        "site": [*_profile_lines(spec, profile), *site_lines(profile)],
        "run": [
            "# With the code as it was when this was submitted: editing the checkout changes nothing.",
            _code_line(spec.code_dir),
            f"EVALUATE=({shlex.join([*command, str(spec.run_dir)])})",
            f"set -- {shlex.join(words)}",
        ],
    }
    return fill_sections(template, sections)


def fill_sections(template: str, sections: Mapping[str, Sequence[str]]) -> str:
    """Replaces the lines between ``# [NAME]`` and ``# [/NAME]``, and the two marks.

    Raises:
        RunError: A section is not there exactly once.
    """
    found = sorted(match[1] for match in _SECTION.finditer(template))
    if found != sorted(sections):
        raise RunError(
            "the batch script's template", value=found, rule=f"it has the sections {sorted(sections)}, each once"
        )
    return _SECTION.sub(lambda match: "".join(f"{line}\n" for line in sections[match[1]]), template)


def job_options(
    specs: Sequence[JobSpec], profile: Profile, options: Mapping[str, OptionValue], array_limit: str = ""
) -> dict[str, OptionValue]:
    """Every option of the job, in the order of the script."""
    spec = specs[0]
    asked: dict[str, OptionValue] = {"job-name": spec.name, "nodes": spec.nodes_to_ask}
    asked["ntasks-per-node"] = spec.ranks_per_node
    if spec.gpus_per_node:
        asked |= _gpus(spec.gpus_per_node, profile)
    if profile.cpus_per_rank is not None and not _sets_cpus(options):
        asked["cpus-per-task"] = profile.cpus_per_rank
    asked |= {name: value for name, value in options.items() if name not in FIRST_ONLY}
    asked |= {"chdir": str(spec.working_dir), "output": spec.log, "open-mode": "append"}
    asked["requeue" if spec.requeue else "no-requeue"] = True
    if spec.signal_lead_s:
        asked["signal"] = f"B:USR2@{spec.signal_lead_s}"
    if spec.spares:
        asked["no-kill"] = True
    if spec.array_task is not None:
        tasks = [task for each in specs if (task := each.array_task) is not None]
        asked["array"] = array_text(tasks) + array_limit
    return asked


def array_text(tasks: Sequence[int]) -> str:
    """Indices as an array option names them: ``0-3,7``."""
    ranges: list[list[int]] = []
    for task in sorted(tasks):
        if ranges and task == ranges[-1][1] + 1:
            ranges[-1][1] = task
        else:
            ranges.append([task, task])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)


def _profile_lines(spec: JobSpec, profile: Profile) -> list[str]:
    described = f": {profile.description}" if profile.description else ""
    return [_comment(f"Profile {spec.profile}{described}")] if spec.profile else []


def site_lines(profile: Profile) -> list[str]:
    """What a profile has run and set before the supervisor starts."""
    lines = [f"module load {' '.join(map(shlex.quote, profile.modules))}"] if profile.modules else []
    lines += profile.setup
    if lines:
        # The scripts behind `module` use variables that are not set.
        lines = ["set +u", *lines, "set -u"]
    return lines + [f"export {name}={_expanding(value)}" for name, value in profile.environment.items()]


def log_pattern(folder: Path, *, array: bool) -> str:
    """Path of a job's log as the output option takes it; a ``%`` of the folder's name stands for itself."""
    name = "log-%A_%a.txt" if array else "log-%j.txt"
    return str(folder).replace("%", "%%") + f"/{name}"


def _gpus(number: int, profile: Profile) -> dict[str, OptionValue]:
    of_type = f"{profile.gpu_type}:{number}" if profile.gpu_type else str(number)
    return {"gpus-per-node": of_type} if profile.gpu_request == "gpus-per-node" else {"gres": f"gpu:{of_type}"}


def _sets_cpus(options: Mapping[str, OptionValue]) -> bool:
    return bool({"cpus-per-task", "cpus-per-gpu"} & options.keys()) or "cpu" in str(options.get("tres-per-task", ""))


def _command_lines(specs: Sequence[JobSpec]) -> list[str]:
    spec = specs[0]
    shared = [text for text in spec.given_overrides if all(text in each.given_overrides for each in specs)]
    overrides = "".join(f" --set {shlex.quote(text)}" for text in shared)
    lines = [_comment(f"{shlex.quote(str(spec.source_config))}{overrides}")]
    if spec.code_dir is not None:
        lines += [
            "# as it was, and with the code as it was, when this was submitted: editing the checkout changes nothing.",
            _code_line(spec.code_dir),
        ]
    command = [spec.python, *entry_command(spec.code_dir), "supervise"]
    return [*lines, f"SUPERVISE=({shlex.join(command)})"]


def _code_line(code_dir: Path) -> str:
    return f"export PYTHONPATH={shlex.quote(str(code_dir))}${{PYTHONPATH:+:$PYTHONPATH}} PYTHONSAFEPATH=1"


def _argument_lines(specs: Sequence[JobSpec]) -> list[str]:
    if specs[0].array_task is None:
        return [f"set -- --run-dir {shlex.quote(str(specs[0].run_dir))}"]
    runs = [f"  [{spec.array_task}]={shlex.quote(str(spec.run_dir))}" for spec in specs]
    return [
        "# One run for each task of the array.",
        "RUNS=(",
        *runs,
        ")",
        'set -- --run-dir "${RUNS[$SLURM_ARRAY_TASK_ID]}"',
    ]


def _comment(text: str) -> str:
    # What follows a line break would be run.
    return "# " + " ".join(text.split())


def _expanding(value: str) -> str:
    """Double-quoted for bash, ``${NAME}`` alone keeping its meaning."""
    parts, end = [], 0
    for match in _REFERENCE.finditer(value):
        parts += [_literal(value[end : match.start()]), match[0]]
        end = match.end()
    return '"' + "".join([*parts, _literal(value[end:])]) + '"'


def _literal(text: str) -> str:
    return re.sub(r'([\\"$`])', r"\\\1", text)
