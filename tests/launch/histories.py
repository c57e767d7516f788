"""Attempts for tests."""

from __future__ import annotations

from dataclasses import fields, replace

from hypothesis import strategies as st

from piip_scale.launch.attempts import Attempt
from piip_scale.launch.decide import CURABLE, INCURABLE, Situation
from piip_scale.run.ending import Ending

NODES = ("n1", "n2", "n3")
ENDS = ("done", "stopped", "crashed", "hang", "lost_node", "preflight", "cut")
KINDS = ("", "exception", "error", "out of device memory", *sorted(CURABLE), *sorted(INCURABLE))


_OF_ENDING = {field.name for field in fields(Ending)}


def attempt(number=0, end="crashed", *, first=0, last=None, **more) -> Attempt:
    """An attempt; what belongs to its ending goes there."""
    values = {"attempt": number, "job_id": 7, "restart_count": 0, "nodes": NODES[:2], "started_unix_s": 100.0 + number}
    values |= {"end": end, "first_step": first, "last_step": first if last is None else last}
    ending = Ending(**{name: more.pop(name) for name in _OF_ENDING & more.keys()})
    return Attempt(**values | {"ending": ending} | more)


def altered(one: Attempt, **changes) -> Attempt:
    """An attempt with another ending."""
    ending = {name: changes.pop(name) for name in _OF_ENDING & changes.keys()}
    return replace(one, ending=replace(one.ending, **ending), **changes)


def situation(**more) -> Situation:
    return Situation(**{"num_nodes": 2, "usable_nodes": NODES} | more)


def crash(number=0, kind="lost rank", **more) -> Attempt:
    return attempt(number, "crashed", reason=kind, **{"line": f"{kind} it was"} | more)


@st.composite
def histories(draw, ends=ENDS):
    """Attempts whose steps only grow, as those of real ones; all but the last were followed by another."""
    found, step = [], 0
    for number in range(draw(st.integers(1, 8))):
        last = step + draw(st.sampled_from((0, 0, 10)))
        found.append(
            attempt(
                number,
                draw(st.sampled_from(ends)),
                first=step,
                last=last,
                reason=draw(st.sampled_from(KINDS)),
                line=draw(st.sampled_from(("a", "b 1", "b 2"))),
                step=draw(st.integers(0, 2)),
                node=draw(st.sampled_from(("", *NODES))),
                cause=draw(st.sampled_from(("", "time limit", "preemption", "requeue"))),
                decision=draw(st.sampled_from(("requeue", "restart", "requeue", "give_up"))),
            )
        )
        step = last
    return found


situations = st.builds(
    Situation,
    num_nodes=st.integers(1, 3),
    usable_nodes=st.lists(st.sampled_from(NODES), unique=True).map(tuple),
    bad_nodes=st.lists(st.sampled_from(NODES), unique=True).map(tuple),
    max_stale_restarts=st.integers(0, 4),
    has_queue=st.booleans(),
    is_ending=st.booleans(),
    asked=st.sampled_from(("", "stop", "requeue", "cancel")),
)
