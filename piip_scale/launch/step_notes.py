"""What srun says of a step on standard error; its exit codes lie, these lines do not."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

_TASK = re.compile(r"srun: error: (?P<node>[\w.-]+): tasks? (?P<rank>\d+)[\d,\[\]-]*: (?P<how>.+)")
_NODE = re.compile(r"srun: error: Node failure on (?P<node>[\w.-]+)")
_LAUNCH = re.compile(r"srun: error: Task launch for .* failed on node (?P<node>[\w.-]+): (?P<how>.+)")
_REFUSED = re.compile(r"srun: (?:error|fatal): (?P<how>Unable to (?:create step|confirm allocation|allocate).*)")
_SIGNALLED = ("Killed", "Terminated", "Segmentation fault", "Bus error", "Aborted", "Illegal instruction", "Floating")


@dataclass(frozen=True)
class TaskEnd:
    """A task that ended badly.

    Attributes:
        node: Its node.
        rank: Its rank; the lowest, where several ended alike.
        how: In srun's words: ``Killed``, ``Exited with exit code 2``.
    """

    node: str
    rank: int
    how: str

    @property
    def by_signal(self) -> bool:
        """Whether a signal ended it."""
        return self.how.startswith(_SIGNALLED)


@dataclass(frozen=True)
class StepNotes:
    """What srun said.

    Attributes:
        first_end: The first task that ended badly; later ones may be its echo.
        failed_nodes: Nodes that Slurm lost meanwhile.
        refusal: Why the step, or tasks of it, did not start.
    """

    first_end: TaskEnd | None = None
    failed_nodes: tuple[str, ...] = ()
    refusal: str = ""


def read_notes(lines: Iterable[str]) -> StepNotes:
    """Picks srun's own lines out of those of all ranks."""
    first, nodes, refusal = None, [], ""
    for line in lines:
        if match := _TASK.match(line):
            first = first or TaskEnd(match["node"], int(match["rank"]), match["how"].strip())
        elif match := _NODE.match(line):
            nodes.append(match["node"])
        elif match := _LAUNCH.match(line):
            refusal = refusal or f"tasks did not start on {match['node']}: {match['how'].strip()}"
        elif match := _REFUSED.match(line):
            refusal = refusal or match["how"].strip()
    return StepNotes(first, tuple(dict.fromkeys(nodes)), refusal)


def is_note(line: str) -> bool:
    """Whether a line is one that ``read_notes`` reads."""
    return line.startswith("srun: ")
