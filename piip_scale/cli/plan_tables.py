"""What ``piip-scale plan`` prints of a run: memory, messages, steps and time as tables for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from piip_scale.cli.planned_run import PlannedRun


def plan_lines(planned: PlannedRun) -> list[str]:
    """All of it, what was changed or decided first."""
    from piip_scale.engine.zero.traffic import traffic_lines

    traffic = traffic_lines(planned.traffic, planned.setting.ranks_per_node)
    lines = [*planned.notes, *_memory(planned), *traffic, *_steps(planned), *_time(planned)]
    return [line for line in lines if line]


def _memory(planned: PlannedRun) -> list[str]:
    from piip_scale.engine.planning.lines import change_lines, host_line, kept_blocks_line, memory_lines

    setting, memory = planned.setting, planned.asked.memory
    without = setting.planner.without_checkpoints(planned.run, setting.num_ranks)
    return [
        *memory_lines(memory),
        kept_blocks_line(without, planned.pace.recomputed_share),
        host_line(memory, setting.ranks_per_node, setting.host_capacity),
        *change_lines(memory, planned.changes, setting.host_of_rank),
    ]


def _steps(planned: PlannedRun) -> list[str]:
    from piip_scale.engine.batching import batch_line, shrunk_line

    run, ranks = planned.run, planned.setting.num_ranks
    return [shrunk_line(run, ranks), batch_line(run, ranks), *planned.pace.lines()]


def _time(planned: PlannedRun) -> list[str]:
    from piip_scale.engine.planning.time_lines import choice_lines, fastest_line, schedule_line, time_lines

    asked = planned.asked
    return [
        *planned.setting.stated(planned.run.train.precision),
        *time_lines(asked.time),
        schedule_line(asked.time, planned.pace.steps),
        *choice_lines(asked, planned.others),
        fastest_line(asked, planned.best, planned.without_copies),
    ]
