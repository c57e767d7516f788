"""What a job was asked to be: written once by whoever submits it, read by whatever runs, watches or restarts it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationError, model_validator

from piip_scale.config.base import Strict
from piip_scale.config.explain import explain
from piip_scale.errors import RunError
from piip_scale.files import disk_errors, write_text_atomically

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
_Model = TypeVar("_Model", bound=Strict)

ENTRY_FILE = "run_piip_scale.py"


class JobSpec(Strict):
    """One run as a job. Paths are absolute, so that any process on any node finds them.

    Attributes:
        name: Of the job, as the queue shows it.
        working_dir: Where the job starts, as it was where it was submitted: shards may be named relative to it.
        config: The config that is trained: frozen and resolved where the job was submitted by our command.
        source_config: The config file the user named.
        overrides: ``key.path=value`` on top of ``config``. Empty where it is resolved.
        given_overrides: What the user gave by ``--set`` and ``--sweep``, for people; ``config`` has it already.
        num_nodes: Nodes that train.
        ranks_per_node: Processes of a node that train.
        gpus_per_node: GPUs asked for on a node; 0 on a cluster without.
        spares: Nodes of the allocation beyond ``num_nodes`` that wait to replace one.
        time_limit: As Slurm reads it (``24:00:00``); empty where the partition decides.
        signal_lead_s: So long before the time limit ranks are asked to save and stop.
        max_stale_restarts: So many restarts in a row may bring no newer checkpoint; then the job gives up.
        requeue: Whether the site lets a job requeue itself; where not, a successor job is submitted.
        chain: Further jobs that were submitted with this one, each to start when the one before ends.
        array_task: Index of a sweep's run in its job array; ``None`` outside of one.
        profile: Name of the site's profile.
        script: The batch script, which a successor is submitted with.
        log: Slurm's pattern of the log's path (``%j`` and its like).
        python: Interpreter of the batch process, on the node itself.
        rank_python: Interpreter of the ranks, in a container where there is one.
        code_dir: Folder put first on PYTHONPATH, a frozen copy of the package; ``None`` where it is as installed.
        srun_options: What the profile adds to each ``srun``, a container's image for example.
        command_prefix: What the profile puts before the interpreter on each rank (``apptainer exec ...``).
        site_variables: Names of the variables that the profile sets in the job.
        local_cache: Folder of each node in which this user's processes have a private one for what they compile; empty
            where the libraries choose.
        profiled_steps: Of each attempt, those that its rank 0 profiles, as ``10-12``; empty for none.
    """

    version: Literal[1] = 1
    name: str
    run_dir: Path
    working_dir: Path
    config: Path
    source_config: Path
    overrides: tuple[str, ...] = ()
    given_overrides: tuple[str, ...] = ()
    num_nodes: Positive = 1
    ranks_per_node: Positive = 1
    gpus_per_node: NonNegative = 0
    spares: NonNegative = 0
    time_limit: str = ""
    signal_lead_s: NonNegative = 300
    max_stale_restarts: NonNegative = 3
    requeue: bool = True
    chain: NonNegative = 0
    array_task: NonNegative | None = None
    profile: str = ""
    script: Path | None = None
    log: str = ""
    python: str = "python3"
    rank_python: str = "python3"
    code_dir: Path | None = None
    srun_options: tuple[str, ...] = ()
    command_prefix: tuple[str, ...] = ()
    site_variables: tuple[str, ...] = ()
    local_cache: str = ""
    profiled_steps: str = ""

    @property
    def rank_command(self) -> tuple[str, ...]:
        """What a rank or a preflight runs, up to the subcommand."""
        return (*self.command_prefix, self.rank_python, *entry_command(self.code_dir))

    @property
    def num_ranks(self) -> int:
        """Processes that train, on all nodes."""
        return self.num_nodes * self.ranks_per_node

    @property
    def nodes_to_ask(self) -> int:
        """Nodes of the allocation, spares included."""
        return self.num_nodes + self.spares

    @classmethod
    def of_command(cls, config: Path, run_dir: Path, **facts: Any) -> JobSpec:
        """The job of a command line given here and now.

        Args:
            config: As it was named, relative to the present folder or absolute.
            run_dir: Absolute; its name is the job's, unless ``facts`` have another.
            facts: Any other attributes.

        Raises:
            ValidationError: A fact that cannot be one.
        """
        config, folder = config.absolute(), Path.cwd()
        given = {"name": run_dir.name, "run_dir": run_dir, "working_dir": folder}
        return cls.model_validate({**given, "config": config, "source_config": config, **facts})

    def with_facts(self, **facts: Any) -> JobSpec:
        """The same job with further facts, checked as at its construction.

        Raises:
            ValidationError: A fact that cannot be one.
        """
        return JobSpec.model_validate(dict(self) | facts)

    @model_validator(mode="after")
    def _paths_are_absolute(self) -> JobSpec:
        for name in ("run_dir", "working_dir", "config", "source_config", "script", "code_dir"):
            path = getattr(self, name)
            if path is not None and not path.is_absolute():
                raise ValueError(f"{name}={str(path)!r} must be absolute: a job starts in another folder")
        return self

    @model_validator(mode="after")
    def _gpus_have_ranks(self) -> JobSpec:
        if self.gpus_per_node not in (0, self.ranks_per_node):
            raise ValueError(
                f"gpus_per_node={self.gpus_per_node} must equal ranks_per_node={self.ranks_per_node}, "
                "or be 0 on a cluster without GPUs"
            )
        return self


def entry_command(code_dir: Path | None) -> tuple[str, ...]:
    """What follows the interpreter for our command.

    A file inside the frozen copy, since ``-m`` looks in the current folder before PYTHONPATH: from a checkout, it would
    run the checkout.
    """
    return ("-m", "piip_scale.cli.main") if code_dir is None else (str(code_dir / ENTRY_FILE),)


class Request(Strict):
    """What a user asked of a job that runs.

    Attributes:
        action: ``stop``: save and end for good; ``requeue``: save, end, and wait in the queue again.
        unix_time_s: When.
        user: Who.
    """

    action: Literal["stop", "requeue"]
    unix_time_s: float
    user: str = ""


class JobFiles:
    """The files of a job, by name: ``job/`` of its run's directory."""

    def __init__(self, run_dir: Path) -> None:
        self.folder = run_dir / "job"
        self.spec = self.folder / "spec.json"
        self.script = self.folder / "train.sbatch"
        self.evaluation = self.folder / "evaluation.json"
        self.evaluation_script = self.folder / "evaluate.sbatch"
        self.frozen = self.folder / "frozen"
        self.attempts = self.folder / "attempts.jsonl"
        self.bad_nodes = self.folder / "bad_nodes.json"
        self.request = self.folder / "request.json"
        self.submitted = self.folder / "submitted.jsonl"


def save_spec(spec: JobSpec) -> Path:
    """Writes a spec into its run's directory; returns the file.

    Raises:
        RunError: The disk refuses.
    """
    path = JobFiles(spec.run_dir).spec
    _write(path, spec)
    return path


def load_spec(run_dir: Path) -> JobSpec | None:
    """The spec of a run's job; ``None`` where the run was never submitted as one.

    Raises:
        ConfigError: The file is no spec, naming the key, its value and the rule.
        RunError: It cannot be read.
    """
    return _read(JobFiles(run_dir).spec, JobSpec)


def save_evaluation(spec: JobSpec) -> None:
    """Writes the spec of an evaluation into the folder of its results, under another name than a run's.

    Raises:
        RunError: The disk refuses.
    """
    _write(JobFiles(spec.run_dir).evaluation, spec)


def load_evaluation(folder: Path) -> JobSpec | None:
    """The spec of the evaluation whose results a folder gets; ``None`` where none was submitted.

    Raises:
        ConfigError: The file is no spec.
        RunError: It cannot be read.
    """
    return _read(JobFiles(folder).evaluation, JobSpec)


def save_request(run_dir: Path, request: Request) -> None:
    """Leaves a request for the job of a run.

    Raises:
        RunError: The disk refuses.
    """
    _write(JobFiles(run_dir).request, request)


def load_request(run_dir: Path) -> Request | None:
    """What was last asked of the job of a run; ``None`` where nothing was.

    Raises:
        ConfigError: The file is no request.
        RunError: It cannot be read.
    """
    return _read(JobFiles(run_dir).request, Request)


def _write(path: Path, model: Strict) -> None:
    with disk_errors(RunError, f"write {path}"):
        write_text_atomically(path, model.model_dump_json(indent=1) + "\n")


def _read(path: Path, model: type[_Model]) -> _Model | None:
    try:
        with disk_errors(RunError, f"read {path}"):
            text = path.read_text(encoding="utf-8", errors="surrogateescape")
    except RunError as error:
        if isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
            return None
        raise
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        raise explain(error, model, f"{path}: key") from None
