"""An evaluation as a job: decided first, then checked with Slurm, frozen and sent; and what it runs on its nodes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from piip_scale.errors import RunError
from piip_scale.files import disk_errors, write_text_atomically
from piip_scale.launch.admission import check_admission
from piip_scale.launch.executors import Step
from piip_scale.launch.freeze import Frozen, freeze_code, freeze_config
from piip_scale.launch.installed_files import launch_folder
from piip_scale.launch.options import OptionValue, first_only_words
from piip_scale.launch.profiles import Profile
from piip_scale.launch.queue import QueuedJob, submit_script
from piip_scale.launch.render import log_pattern, render_evaluation
from piip_scale.launch.runs import is_ending
from piip_scale.launch.slurm_executor import SlurmExecutor
from piip_scale.launch.spec import JobFiles, JobSpec, save_evaluation
from piip_scale.launch.submitting import check_path, site_facts

_POLL_S = 0.2


@dataclass(frozen=True)
class Evaluation:
    """An evaluation as it will be sent.

    Attributes:
        spec: The job; its run's directory is the folder that gets the results.
        script: The batch script's text.
        options: Options of the job.
    """

    spec: JobSpec
    script: str
    options: Mapping[str, OptionValue] = field(default_factory=dict)

    @property
    def files(self) -> JobFiles:
        """The job's files."""
        return JobFiles(self.spec.run_dir)


def plan_evaluation(
    job: JobSpec, profile: Profile, options: Mapping[str, OptionValue], words: Sequence[str]
) -> Evaluation:
    """What an evaluation comes to; writes and sends nothing.

    Args:
        job: As it was asked for.
        profile: The site.
        options: Of the job, merged.
        words: Arguments of ``evaluate``, all but the results' folder and the model.

    Raises:
        ConfigError: A name that cannot stand in a batch script.
        RunError: The batch script is not installed.
    """
    in_container, files = profile.container is not None, JobFiles(job.run_dir)
    check_path("--out", job.run_dir, in_container=in_container)
    check_path("the folder to submit from", job.working_dir, in_container=in_container)
    # It has nothing to save before its time is over.
    own = {"signal_lead_s": 0, "script": files.evaluation_script, "log": log_pattern(files.folder, array=False)}
    spec = job.with_facts(**site_facts(job, profile) | own, code_dir=Frozen(files.frozen).code)
    template = (launch_folder() / "evaluate.sbatch").read_text(encoding="utf-8")
    arguments = [str(spec.config), *words, "--out", str(spec.run_dir)]
    return Evaluation(spec, render_evaluation(template, spec, profile, options, arguments), options)


def refuse_double(evaluation: Evaluation, queue: Sequence[QueuedJob]) -> None:
    """Refuses to send a second job that would write the same results.

    Raises:
        RunError: There is one in the queue.
    """
    script = str(evaluation.files.evaluation_script)
    for job in queue:
        if job.command == script and not is_ending(job):
            raise RunError(
                f"{evaluation.spec.run_dir} has job {job.name} ({job.state.lower()})",
                fix=f"wait for it, or scancel {job.name}, or choose another --out",
            )


def send_evaluation(evaluation: Evaluation, config: str | None) -> tuple[int, list[str]]:
    """Checks the script with Slurm, freezes what will run, and submits.

    Args:
        evaluation: What to send.
        config: The resolved config, as text; ``None`` where a run's directory brings its own.

    Returns:
        The job's id, and what is worth a line for the user.

    Raises:
        SlurmError: Slurm refuses; nothing is left behind where it does so at the check.
        RunError: The disk refuses.
    """
    spec, files = evaluation.spec, evaluation.files
    notes = check_admission(evaluation.script, spec, evaluation.options)
    freeze_code(files.frozen)
    if config is not None:
        freeze_config(files.frozen, config)
    save_evaluation(spec)
    with disk_errors(RunError, f"write {files.evaluation_script}"):
        write_text_atomically(files.evaluation_script, evaluation.script)
        files.evaluation_script.chmod(0o755)
    first_only = first_only_words(evaluation.options)
    return submit_script(files.evaluation_script, spec.working_dir, first_only), notes


def run_ranks(spec: JobSpec, executor: SlurmExecutor, words: Sequence[str]) -> int:
    """Evaluates on all nodes of this allocation; returns the exit code.

    Args:
        spec: The job.
        executor: Of the allocation.
        words: Arguments of ``evaluate``.

    Raises:
        SlurmError: Slurm refuses the step.
    """
    step: Step = executor.start(
        ["evaluate", *words], executor.allocated(), spec.ranks_per_node, executor.restart_count, spec.run_dir
    )
    while (code := step.poll()) is None:
        time.sleep(_POLL_S)
    return code if code >= 0 else 128 - code
