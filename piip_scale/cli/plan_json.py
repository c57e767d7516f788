"""What ``piip-scale plan --json`` prints of a run, for programs."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from piip_scale.cli.planned_run import PlannedRun
    from piip_scale.engine.planning.choices import Choice


def plan_json(planned: PlannedRun) -> dict[str, Any]:
    """Memory, what makes it fit, messages, steps, time, and other ways to run."""
    return _memory(planned) | {
        "traffic": _traffic(planned),
        "pace": asdict(planned.pace),
        "gpu": asdict(planned.setting.gpu),
        "network_gbps_of_a_node": planned.setting.network_gbps,
        "time": asdict(planned.asked.time) | _choice(planned.asked),
        "choices": [_choice(choice) for choice in planned.others],
        "fastest": None if planned.best is None else _choice(planned.best),
        "notes": planned.notes,
    }


def _memory(planned: PlannedRun) -> dict[str, Any]:
    memory = planned.asked.memory
    ways = [{"knob": each.knob, "total": each.plan.total, "fits": each.plan.fits} for each in planned.changes]
    return asdict(memory) | {"total": memory.total, "fits": memory.fits, "changes": ways}


def _traffic(planned: PlannedRun) -> list[dict[str, Any]]:
    per_node = planned.setting.ranks_per_node
    return [
        asdict(each) | {"inside": each.inside(per_node), "between": each.between(per_node)} for each in planned.traffic
    ]


def _choice(choice: Choice) -> dict[str, Any]:
    time = choice.time
    return {
        "name": choice.name,
        "seconds": time.seconds,
        "images_per_s": time.images_per_s,
        "mfu": time.mfu,
        "bound_by": time.bound_by,
        "bytes": choice.memory.total,
        "fits": choice.fits,
    }
