"""What a job must know of its site, as data: one small TOML file for each site, in launch/profiles/ or anywhere."""

from __future__ import annotations

import difflib
import json
import re
import sys
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from piip_scale.config.base import Strict
from piip_scale.config.explain import explain
from piip_scale.errors import ConfigError
from piip_scale.launch.installed_files import launch_folder
from piip_scale.launch.options import OptionValue, check_options

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Positive = Annotated[int, Field(ge=1)]
_SUFFIX = ".toml"
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class Container(Strict):
    """The image that ranks run in; the batch process itself runs on the bare node.

    Attributes:
        kind: Slurm's plugin pyxis (enroot), or a command before the interpreter.
        image: File or name, as that takes it.
        python: Interpreter in it, with this package's requirements; the package itself comes from the run's copy.
        mounts: Folders that are there under the same name, or ``OUTSIDE:INSIDE``. The run's directory and the folder
            the job starts in are always there.
        options: More options of pyxis (for each srun) or of the command.
    """

    kind: Literal["pyxis", "apptainer", "singularity"]
    image: str
    python: str = "python3"
    mounts: tuple[str, ...] = ()
    options: tuple[str, ...] = ()

    def srun_options(self, folders: tuple[Path, ...], working_dir: Path) -> tuple[str, ...]:
        """What each srun needs to start a step in the container."""
        if self.kind != "pyxis":
            return ()
        mounts = ",".join(f"{outside}:{inside}" for outside, inside in self._mounts(folders))
        return (
            f"--container-image={self.image}",
            f"--container-mounts={mounts}",
            f"--container-workdir={working_dir}",
            *self.options,
        )

    def command_prefix(self, folders: tuple[Path, ...], working_dir: Path) -> tuple[str, ...]:
        """What stands before the interpreter to run it in the container."""
        if self.kind == "pyxis":
            return ()
        binds = ",".join(f"{outside}:{inside}" for outside, inside in self._mounts(folders))
        # Also where none are asked for, since whole nodes come with theirs; on nodes without, --nv is a line of log.
        nvidia = () if "--rocm" in self.options else ("--nv",)
        return (self.kind, "exec", *nvidia, "--bind", binds, "--pwd", str(working_dir), *self.options, self.image)

    def _mounts(self, folders: tuple[Path, ...]) -> list[tuple[str, str]]:
        texts = dict.fromkeys([*self.mounts, *map(str, folders)])
        pairs = (text.partition(":") for text in texts)
        return [(outside, inside or outside) for outside, _, inside in pairs]


class Profile(Strict):
    """A site.

    Attributes:
        description: One line for whoever chooses among profiles.
        gpu_request: How a job asks for GPUs: ``gpus-per-node``, ``gres`` (``gpu:TYPE:N``), or ``none`` where nodes
            have none, or are given whole: then each rank uses one of those it finds.
        gpu_type: Their type in that request; empty for any.
        gpu_memory_gib: Memory of one, to report before submitting whether the run fits.
        cpus_per_rank: Cores for a rank and its loader workers, unless ``cpus-per-task`` is given.
        requeue: Whether jobs may requeue themselves.
        signal_lead_s: So long before the time limit the training is asked to save and stop.
        python: Interpreter of the batch process on the nodes; the one that submits where empty.
        modules: For ``module load``.
        setup: Lines of bash that run before anything else of ours.
        environment: Variables of the job; ``${NAME}`` is filled in on the node.
        local_cache: Folder of each node, ``/tmp`` for example, in which this user's jobs make a private one for what
            Triton and torch compile; where empty those choose, mostly the home folder that all nodes share.
        srun: Options added to each srun, ``--mpi=none`` for example.
        container: What ranks run in.
        sbatch: Options of the job; those of the command line come first.
    """

    description: str = ""
    gpu_request: Literal["gpus-per-node", "gres", "none"] = "gpus-per-node"
    gpu_type: str = ""
    gpu_memory_gib: Annotated[float, Field(gt=0)] | None = None
    cpus_per_rank: Positive | None = None
    requeue: bool = True
    signal_lead_s: Annotated[int, Field(ge=0, le=65535)] = 300
    python: str = ""
    modules: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()
    environment: dict[str, str] = {}
    local_cache: str = ""
    srun: tuple[str, ...] = ()
    container: Container | None = None
    sbatch: dict[str, OptionValue] = {}

    @field_validator("environment")
    @classmethod
    def _names_of_variables(cls, environment: dict[str, str]) -> dict[str, str]:
        for name, value in environment.items():
            if not _VARIABLE.fullmatch(name):
                raise ValueError(f"{name!r} is no name of a variable: letters, digits and _")
            if not value.isprintable():
                raise ValueError(f"{name} must be one line")
        return environment

    @field_validator("modules", "setup", "srun")
    @classmethod
    def _lines(cls, texts: tuple[str, ...]) -> tuple[str, ...]:
        for text in texts:
            if not text or "\n" in text:
                raise ValueError(f"each entry is one line, got {text!r}")
        return texts

    @field_validator("local_cache")
    @classmethod
    def _is_absolute(cls, folder: str) -> str:
        if folder and not (folder.startswith("/") and folder.isprintable()):
            raise ValueError(f"it is a folder's whole path, got {folder!r}")
        return folder

    @model_validator(mode="after")
    def _container_has_python(self) -> Profile:
        if self.container is not None and not self.python:
            raise ValueError(
                "container needs python: an interpreter on the bare node that has this package's requirements"
            )
        return self


def load_profile(name: str) -> Profile:
    """A profile by its name in launch/profiles/, or by its file.

    Raises:
        ConfigError: There is none, naming those there are, or it cannot be meant, naming key, value and rule.
    """
    path = _profile_path(name)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    # Brackets in brackets without end are too deep for the reader itself.
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"profile {path} cannot be read: {error}") from None
    try:
        # As JSON, where lists are tuples, dates the text that Slurm reads, and all else stays strict.
        profile = Profile.model_validate_json(json.dumps(values, default=lambda value: value.isoformat()))
    except ValidationError as error:
        raise explain(error, Profile, f"profile {path}: key") from None
    check_options(profile.sbatch, f"profile {path}")
    return profile


def profile_names() -> list[str]:
    """Names of the profiles that ship."""
    return sorted(path.stem for path in (launch_folder() / "profiles").glob(f"*{_SUFFIX}"))


def _profile_path(name: str) -> Path:
    path = Path(name)
    if path.suffix == _SUFFIX:
        if not path.is_file():
            raise ConfigError("profile file not found", value=name, fix=f"profiles that ship: {_listing()}")
        return path
    if name in profile_names():
        return launch_folder() / "profiles" / f"{name}{_SUFFIX}"
    near = difflib.get_close_matches(name, profile_names(), n=1, cutoff=0.5)
    rule = f"did you mean {near[0]}? " if near else ""
    raise ConfigError("unknown profile", value=name, rule=f"{rule}there are {_listing()}", fix="or name a .toml file")


def _listing() -> str:
    return ", ".join(profile_names())
