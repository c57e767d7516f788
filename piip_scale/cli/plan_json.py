"""What ``piip-scale plan --json`` prints of a run, or of how it scales, for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from piip_scale.cli.planned_run import PlannedRun
    from piip_scale.engine.planning.choices import Choice
    from piip_scale.engine.planning.scaling import Scaled, ScalingPoint


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


def scaling_json(points: Sequence[ScalingPoint]) -> list[dict[str, Any]]:
    """Each number of nodes, with a step of as many images where GPUs can share it, and with as many on each GPU."""
    return [
        {
            "nodes": point.nodes,
            "num_ranks": point.num_ranks,
            "strong": None if point.strong is None else _scaled(point.strong),
            "weak": _scaled(point.weak),
        }
        for point in points
    ]


def _scaled(scaled: Scaled) -> dict[str, Any]:
    ways = {"written": scaled.written, "fastest": scaled.fastest, "uncheckpointed": scaled.uncheckpointed}
    return {"images": scaled.fastest.time.images} | {
        name: None if way is None else _choice(way) | {"layout": _layout(way)} for name, way in ways.items()
    }


def _layout(choice: Choice) -> dict[str, Any]:
    from piip_scale.config.zero import LAYOUT

    return {key: getattr(choice.config.zero, key) for key in LAYOUT}


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
