"""The errors a user can meet. Each is one line: what is wrong, the value, the rule, the fix."""

from __future__ import annotations

from piip_scale.text import printable as printable

_MOST_LETTERS = 1000


def _shortened(shown: str) -> str:
    """What a value looks like, up to a length that a line may have: values come from outside, and may be files."""
    return shown if len(shown) <= _MOST_LETTERS else f"{shown[:_MOST_LETTERS]}... ({len(shown)} characters)"


class PiipError(Exception):
    """Base of every error this package raises on purpose.

    Args:
        problem: What is wrong, naming the thing (a key, a file, a rank), without a final period.
        value: The offending value; left out of the message when ``None``.
        rule: What would have been right.
        fix: What to do about it, as an imperative.

    Attributes:
        exit_code: What a process that ends with it exits with.
        reason: What kind of end it is, for whoever restarts runs: ``error``, or a kind of its own. An instance may
            have another than its class, where it knows more.
        is_echo: It was raised here because another rank raised it, and that rank reports it.
        details: More than a line has room for; ``errors/`` of a run directory keeps it.
    """

    exit_code = 2
    reason = "error"
    is_echo = False
    details = ""

    def __init__(self, problem: str, *, value: object = None, rule: str = "", fix: str = "") -> None:
        self.problem, self.value, self.rule, self.fix = problem, value, rule, fix
        super().__init__(self.line)

    @property
    def line(self) -> str:
        """The whole message on one line that any terminal shows as it is."""
        head = self.problem if self.value is None else f"{self.problem}: got {_shortened(repr(self.value))}"
        parts = [head, self.rule, self.fix]
        return printable(" ".join("; ".join(part for part in parts if part).split()))

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions pickle by positional arguments only; loader workers must be able to send ours, with any value.
        value = None if self.value is None else _Shown(repr(self.value))
        return _rebuild, (type(self), self.problem, value, self.rule, self.fix, self.reason)


class _Shown(str):
    """How a value looked where it was raised."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def _rebuild(kind: type[PiipError], problem: str, value: object, rule: str, fix: str, reason: str) -> PiipError:
    error = kind(problem, value=value, rule=rule, fix=fix)
    error.reason = reason
    return error


class ConfigError(PiipError):
    """A config file or override that cannot be meant as written."""

    reason = "bad config"


class WorldError(PiipError):
    """The environment's ranks and nodes do not add up."""

    reason = "bad world"


class KernelError(PiipError):
    """A kernel or library that the config asks for is not there."""


class ModelError(PiipError):
    """Weights and model do not fit together."""

    reason = "bad model"


class DataError(PiipError):
    """Annotations, images or shards that cannot be used."""

    reason = "bad data"


class FetchError(DataError):
    """A file of a remote set that did not come.

    Attributes:
        is_final: Trying again later is of no use.
    """

    is_final = False


class CheckpointError(PiipError):
    """A checkpoint that is absent, incomplete, or of another model."""


class RunError(PiipError):
    """A run directory or a running training that cannot go on."""

    exit_code = 1


class HangError(RunError):
    """Ranks waited too long for each other, or for something outside.

    Attributes:
        late_ranks: Those that the others waited for.
    """

    reason = "hang"
    late_ranks: tuple[int, ...] = ()


class DeviceMemoryError(RunError):
    """A rank's device ran out of memory; ``details`` hold what the run was planned to need."""

    reason = "out of device memory"

    def __init__(self, problem: str, *, value: object = None, rule: str = "", fix: str = "", details: str = "") -> None:
        super().__init__(problem, value=value, rule=rule, fix=fix)
        self.details = details


class LostRankError(RunError):
    """A rank's process ended without a word, as one that the system kills does."""

    reason = "lost rank"


class Interrupted(RunError):
    """The run was asked to stop (Ctrl-C or TERM), saved, and did."""

    reason = "interrupted"
    exit_code = 130


class SlurmError(RunError):
    """Slurm refused a command, or did not answer."""
