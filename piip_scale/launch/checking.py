"""Has every node look at itself, and finds which of them can train."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from piip_scale.errors import RunError
from piip_scale.files import disk_errors
from piip_scale.launch.executors import Executor, Step
from piip_scale.launch.node_facts import (
    Answer,
    Needs,
    load_facts,
    problems_of_nodes,
    shared_problem,
    summary,
)
from piip_scale.launch.spec import JobSpec
from piip_scale.launch.step_notes import StepNotes

_POLL_S = 0.2
# Nodes that read the same libraries from the same disk are ready at about the same time.
_STRAGGLE_S = 60.0
_LAST_WORDS_S = 5.0


@dataclass(frozen=True)
class Check:
    """What came of it.

    Attributes:
        healthy: Nodes that can train, in order.
        problems: What is wrong with the others.
        shared_problem: Kind and line of what is wrong with config or shards on every node.
        line: What the healthy ones have, for people.
        seconds: How long it took.
    """

    healthy: tuple[str, ...]
    problems: Mapping[str, str] = field(default_factory=dict)
    shared_problem: tuple[str, str] | None = None
    line: str = ""
    seconds: float = 0.0


def check_nodes(
    spec: JobSpec, executor: Executor, nodes: Sequence[str], number: int, folder: Path, bound_s: float
) -> Check:
    """Looks at nodes, all at once.

    Args:
        spec: The job, whose needs and shards count.
        executor: Starts the looks.
        nodes: Where.
        number: The attempt's.
        folder: Takes the answers.
        bound_s: How long it may take; a node that has not answered then fails.

    Raises:
        RunError: The folder cannot be written.
    """
    needs, started_s = Needs(spec.ranks_per_node, spec.gpus_per_node), time.monotonic()
    if not nodes:
        return Check((), line="no nodes to look at")
    answers, notes, code = _ask(spec, executor, nodes, number, folder, bound_s)
    seconds = time.monotonic() - started_s
    if not answers and (failure := _failure(notes, code, nodes, bound_s)):
        return Check((), shared_problem=failure, line="no node answered", seconds=seconds)
    problems = problems_of_nodes(nodes, answers, needs, bound_s)
    problems |= {
        node: f"its preflight ended without an answer ({how})" for node, how in notes.ends if node not in answers
    }
    problems |= {node: "it was lost during its preflight" for node in notes.failed_nodes if node in nodes}
    healthy = tuple(node for node in nodes if node not in problems)
    shared = shared_problem(answers, problems)
    line = f"{len(healthy)} healthy"
    if healthy and not shared:
        line += "; " + summary({node: answers[node] for node in healthy}, needs)
    return Check(healthy, problems, shared, line, seconds)


def _failure(notes: StepNotes, code: int | None, nodes: Sequence[str], bound_s: float) -> tuple[str, str] | None:
    """Kind and line of why a preflight could not run, of which no node is to blame; ``None`` where one is.

    Args:
        notes: Slurm's lines about it.
        code: Its exit code; ``None`` where it did not end by itself.
        nodes: Where it was to run.
        bound_s: How long it had.
    """
    if notes.refusal:
        return ("bad config" if notes.is_final else "launch"), f"the preflight could not run: {notes.refusal}"
    if code is not None:
        how = notes.first_end.how if notes.first_end else f"exit code {code}"
        return "launch", f"the preflight could not run: it ended at once on every node ({how}); see the job's log"
    if len(nodes) > 1:
        return "launch", f"the preflight could not run: none of {len(nodes)} nodes answered within {bound_s:.0f} s"
    return None


def _ask(
    spec: JobSpec, executor: Executor, nodes: Sequence[str], number: int, folder: Path, bound_s: float
) -> tuple[dict[str, Answer], StepNotes, int | None]:
    """The answers, Slurm's lines about the step, and its exit code where it ended by itself."""
    with disk_errors(RunError, f"write {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("*.json"):
            old.unlink()
    arguments = ["preflight-node", str(folder), f"--config={spec.config}", f"--gpus={spec.gpus_per_node}"]
    arguments += [f"--bound-s={bound_s:g}", *(f"--set={override}" for override in spec.overrides)]
    asked_unix_s = time.time()
    step = executor.start(arguments, nodes, 1, 2 * number, folder)
    answers = _collect(step, nodes, folder, asked_unix_s, bound_s)
    code = step.poll()
    # One of which no node answered has nothing to finish.
    _end(step, _LAST_WORDS_S if answers else 0.0)
    return answers, step.notes(), code


def _collect(step: Step, nodes: Sequence[str], folder: Path, asked_unix_s: float, bound_s: float) -> dict[str, Answer]:
    answers: dict[str, Answer] = {}
    started_s, first_s = time.monotonic(), 0.0
    while True:
        has_ended = step.poll() is not None
        for node, facts in load_facts(folder).items():
            # The time at which its first answer was seen; later ones add the sum over all nodes.
            seen_unix_s = answers[node].seen_unix_s if node in answers else time.time()
            answers[node] = Answer(facts, asked_unix_s, seen_unix_s)
        now_s = time.monotonic()
        first_s = first_s or (now_s if answers else 0.0)
        late = now_s - started_s > bound_s or (first_s and now_s - first_s > _STRAGGLE_S)
        if has_ended or late or _is_complete(answers, nodes):
            return {node: answers[node] for node in nodes if node in answers}
        time.sleep(_POLL_S)


def _is_complete(answers: Mapping[str, Answer], nodes: Sequence[str]) -> bool:
    return len(nodes) > 1 and all(node in answers and answers[node].facts.reduction for node in nodes)


def _end(step: Step, patience_s: float) -> None:
    """Its resources are needed for the training."""
    until_s = time.monotonic() + patience_s
    while step.poll() is None and time.monotonic() < until_s:
        time.sleep(_POLL_S)
    if step.poll() is None:
        step.end()
    until_s = time.monotonic() + 30.0
    while step.poll() is None and time.monotonic() < until_s:
        time.sleep(_POLL_S)
