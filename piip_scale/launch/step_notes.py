"""What srun and slurmstepd report of a step on standard error; its exit codes mislead, these lines do not."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from piip_scale.launch.node_lists import NODE_LIST, expand_nodes

_TASK = re.compile(rf"error: (?P<nodes>{NODE_LIST}): tasks? (?P<rank>\d+)[\d,\[\]-]*: (?P<how>.+)")
_NODE = re.compile(rf"error: (?:Node failure on|\*\*\* .* DUE TO NODE) (?P<nodes>{NODE_LIST})(?: FAILURE|$)")
_LAUNCH = re.compile(
    rf"error: (?:Task launch for .* failed on nodes? (?P<nodes>{NODE_LIST})"
    rf"|(?P<of>{NODE_LIST}): tasks? [\d,\[\]-]+: launch failed): (?P<how>.+)"
)
# What keeps a step from beginning whatever else is reported.
_REFUSED = re.compile(
    r"(?:(?:error|fatal): )?(?P<how>(?:unrecognized option|invalid option|ambiguous option|option .* requires).*"
    r"|Unable to (?:create step|confirm allocation|allocate).*|Application launch failed.*|Only allocated \d+ nodes.*"
    r"|Invalid .*|execve\(\).*|(?:pyxis|spank|enroot)\b.*|Failed to invoke spank plugin stack.*)"
)
_FATAL = re.compile(r"fatal: (?P<how>.+)")
_OTHER = re.compile(r"error: (?P<how>.+)")
# Of the command line itself: the same on any node, and at any time.
_FINAL = re.compile(
    r"\boption\b|[Ii]nvalid (numeric value|MPI type|--)|mutually exclusive|set by two different|Only allocated"
)
# Reported of steps that run, or end, as they should.
_ASIDE = re.compile(r"\*\*\* |couldn't chdir|Timed out waiting|ioctl|Job step aborted|Received signal")
_OUT_OF_MEMORY = re.compile(r"oom[-_ ]kill|[Oo]ut[- ][Oo]f[- ][Mm]emory")
_SOURCE = re.compile(r"(?:srun|slurmstepd(?:-(?P<node>[\w.-]+))?): (?P<text>.*)")
_EXIT_CODE = re.compile(r"Exited with exit code (\d+)")
# What a shell or a container's runtime makes of a process that KILL, SEGV, ABRT, BUS, ILL or FPE ended.
_CODES_OF_SIGNALS = {137, 139, 134, 135, 132, 136}
_MOST_LETTERS = 400


@dataclass(frozen=True)
class TaskEnd:
    """A task that ended badly.

    Attributes:
        node: Its node.
        rank: Its rank; the lowest, where several ended alike.
        how: As srun names it: ``Killed``, ``Exited with exit code 2``.
    """

    node: str
    rank: int
    how: str

    @property
    def by_signal(self) -> bool:
        """Whether a signal ended it: srun writes each signal's name, and ends by themselves in one way alone."""
        code = _EXIT_CODE.match(self.how)
        return code is None or int(code[1]) in _CODES_OF_SIGNALS

    @property
    def is_out_of_memory(self) -> bool:
        """Whether it took more memory than its job, or its node, has."""
        return bool(_OUT_OF_MEMORY.search(self.how))


@dataclass(frozen=True)
class StepNotes:
    """What was reported of a step.

    Attributes:
        first_end: The first task that ended badly; later ones may be its echo.
        failed_nodes: Nodes that Slurm lost meanwhile.
        refusal: Why the step, or tasks of it, did not start.
        is_final: Whether the same would be refused again, anywhere: options that srun does not take.
        ends: How the first task of each node ended badly, by node.
        is_out_of_memory: Whether the kernel killed some of it for the memory it took, whatever else is known.
    """

    first_end: TaskEnd | None = None
    failed_nodes: tuple[str, ...] = ()
    refusal: str = ""
    is_final: bool = False
    ends: tuple[tuple[str, str], ...] = ()
    is_out_of_memory: bool = False


def read_notes(lines: Iterable[str]) -> StepNotes:
    """Picks Slurm's own lines out of those of all ranks."""
    notes = _Notes()
    for line in lines:
        if match := _SOURCE.match(line):
            notes.take(match["text"].strip(), match["node"] or "")
    return notes.all()


def is_note(line: str) -> bool:
    """Whether a line is one that ``read_notes`` reads."""
    return _SOURCE.match(line) is not None


class _Notes:
    """What was read so far."""

    def __init__(self) -> None:
        self.ends: dict[str, TaskEnd] = {}
        self.nodes: dict[str, None] = {}
        self.refusals: dict[str, None] = {}
        self.others: dict[str, None] = {}
        self.memory_nodes: dict[str, None] = {}

    def take(self, text: str, node: str) -> None:
        if _OUT_OF_MEMORY.search(text) and not _TASK.match(text):
            self.memory_nodes[node] = None
        elif match := _LAUNCH.match(text):
            nodes = expand_nodes(match["nodes"] or match["of"])
            self.refusals[f"tasks did not start on {', '.join(nodes)}: {match['how']}"] = None
        elif match := _TASK.match(text):
            for each in expand_nodes(match["nodes"]):
                self.ends.setdefault(each, TaskEnd(each, int(match["rank"]), match["how"].strip()))
        elif match := _NODE.match(text):
            self.nodes |= dict.fromkeys(expand_nodes(match["nodes"]))
        elif not _ASIDE.search(text) and (match := _REFUSED.match(text) or _FATAL.match(text)):
            self.refusals[match["how"]] = None
        elif not _ASIDE.search(text) and (match := _OTHER.match(text)):
            self.others[match["how"]] = None

    def all(self) -> StepNotes:
        first = next(iter(self.ends.values()), None)
        if first and self.memory_nodes and not first.is_out_of_memory and first.by_signal:
            # The kernel's, which srun reports as any other kill.
            first = TaskEnd(first.node, first.rank, f"{first.how}, Out Of Memory")
        # Other complaints explain a step of which no task began; of one that ran they may be its end's echo.
        reported = self.refusals or (self.others if not self.ends and not self.nodes else {})
        refusal = "; ".join(reported)[:_MOST_LETTERS]
        ends = tuple((node, end.how) for node, end in self.ends.items())
        is_out_of_memory = bool(self.memory_nodes) or (first is not None and first.is_out_of_memory)
        return StepNotes(first, tuple(self.nodes), refusal, bool(_FINAL.search(refusal)), ends, is_out_of_memory)
