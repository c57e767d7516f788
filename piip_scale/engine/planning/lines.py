"""Plans as lines for people."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from piip_scale.engine.planning.memory import GIB, MemoryPlan
from piip_scale.engine.planning.planner import Change

_MIB = 2**20
_FITS = "fits"


def memory_lines(plan: MemoryPlan) -> list[str]:
    """A table of a plan in GiB, or MiB where it is small: kinds by part, then what is nobody's in particular."""
    names = ("weights", "gradients", "masters", "moments", "activations", "off GPU")
    gpus = "the GPU" if plan.num_ranks == 1 else f"each of {plan.num_ranks} GPUs"
    unit, text = _unit(plan.total - plan.reserve)
    lines = [f"{unit} on {gpus}, micro-batches of {plan.micro_batch_size}", _cells("part", *names)]
    kinds = [(p.weights, p.gradients, p.masters, p.moments, p.activations, p.host) for p in plan.parts]
    names_of_parts = [*(part.name for part in plan.parts), "all parts"]
    for name, row in zip(names_of_parts, [*kinds, [sum(column) for column in zip(*kinds, strict=True)]], strict=True):
        lines.append(_cells(name, *map(text, row)))
    rest = {"gathered": plan.gathered, "buckets": plan.buckets, "backward": plan.backward, "libraries": plan.reserve}
    lines.append(
        "and " + ", ".join(f"{name} {text(size)}" for name, size in rest.items()) + _at_other_times(plan, text)
    )
    verdict = "fits into" if plan.fits else "does not fit into"
    lines.append(f"{plan.total / GIB:.1f} GiB, which {verdict} {plan.capacity / GIB:.1f}")
    return lines


def _unit(num_bytes: float) -> tuple[str, Callable[[float], str]]:
    """The unit of a table of so many bytes in all, and how it writes a number of them."""
    if num_bytes >= GIB:
        return "GiB", lambda size: f"{size / GIB:.2f}"
    return "MiB", lambda size: f"{size / _MIB:.1f}"


def _at_other_times(plan: MemoryPlan, text: Callable[[float], str]) -> str:
    if plan.update_holds_most:
        return f"; the update holds most, {text(plan.update)} in the place of all these but libraries"
    return f", less {text(plan.later)} of gradients that come when activations have gone" if plan.later else ""


def host_line(plan: MemoryPlan, ranks_per_node: int, capacity: float | None) -> str:
    """What a node's host memory holds, and whether it can where that is known."""
    needed = plan.host_memory * ranks_per_node
    verdict = (
        ""
        if capacity is None
        else f", which {'fits' if needed <= capacity else 'does not fit'} into {capacity / GIB:.1f}"
    )
    fix = "" if capacity is None or needed <= capacity else ": set train.background_saves=False or offload less"
    unit, text = _unit(needed)
    return (
        f"{text(needed)} {unit} of a node's host memory for what is offloaded and the copies that saves write from"
        f"{verdict}{fix}; loaders, and page-locked memory's rounding to powers of two, come on top"
    )


def kept_blocks_line(plan: MemoryPlan | None, saved_share: float) -> str:
    """What not to compute blocks again would gain, where ``Planner.without_checkpoints`` found a plan that fits."""
    if plan is None:
        return ""
    return (
        f"without checkpointed blocks {plan.total / GIB:.1f} GiB, which fits too and leaves out {saved_share:.0%} of a "
        "step's arithmetic: --set 'model.branches.*.checkpoint_blocks=auto'"
    )


def change_lines(plan: MemoryPlan, changes: Sequence[Change], host_of_rank: float = math.inf) -> list[str]:
    """What to change, in this order, where a plan does not fit.

    Args:
        plan: The plan.
        changes: What was found.
        host_of_rank: A rank's share of its host's memory, in bytes.
    """
    if plan.fits:
        return []
    verdicts = [_verdict(change.plan, host_of_rank) for change in changes]
    lines = ["to make it fit, in this order:"]
    for change, verdict in zip(changes, verdicts, strict=True):
        # More GPUs are another way: what follows is counted without them.
        knob = f"or {change.knob}, without what follows" if change.plan.num_ranks > plan.num_ranks else change.knob
        lines.append(f"  {knob}: {change.plan.total / GIB:.1f} GiB, {verdict}")
    if _FITS not in verdicts:
        lines.append("  nothing here is enough: smaller images, a smaller network, or GPUs with more memory")
    return lines


def _verdict(plan: MemoryPlan, host_of_rank: float) -> str:
    if not plan.fits:
        return "does not yet"
    full = f"fits, but a node's host memory is full: {plan.host_memory / GIB:.1f} GiB for each of its ranks"
    return _FITS if plan.host_memory <= host_of_rank else full


def _cells(name: str, *others: str) -> str:
    return f"{name:<16}" + "".join(f"{text:>13}" for text in others)
