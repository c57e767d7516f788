"""The learning rate's factor, as pure functions of the step: resuming needs no state."""

from __future__ import annotations

import math

from piip_scale.config.run import ScheduleConfig


def lr_factor(schedule: ScheduleConfig, step: int, total_steps: int) -> float:
    """Factor on every group's base rate at one step.

    Warm-up multiplies the schedule rather than delaying it, so milestones and the cosine's end stay where the
    config puts them.

    Args:
        schedule: The schedule.
        step: Optimiser steps behind this one, 0 for the first.
        total_steps: Steps of the whole run.
    """
    return _warmup(schedule, step) * _decay(schedule, step, total_steps)


def _warmup(schedule: ScheduleConfig, step: int) -> float:
    if step >= schedule.warmup_steps:
        return 1.0
    return schedule.warmup_ratio + (1.0 - schedule.warmup_ratio) * step / schedule.warmup_steps


def _decay(schedule: ScheduleConfig, step: int, total_steps: int) -> float:
    if schedule.kind == "constant":
        return 1.0
    if schedule.kind == "step":
        passed = sum(step >= round(share * total_steps) for share in schedule.milestones)
        return float(schedule.gamma**passed)
    progress = min(step / total_steps, 1.0)
    left = (1.0 - progress) ** schedule.power if schedule.kind == "poly" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return float(schedule.final_ratio + (1.0 - schedule.final_ratio) * left)
