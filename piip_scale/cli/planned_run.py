"""All that ``piip-scale plan`` finds of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from piip_scale.cli.pace import Pace

if TYPE_CHECKING:
    from piip_scale.cli.plan_setting import Setting
    from piip_scale.config import RunConfig
    from piip_scale.engine.planning.choices import Choice
    from piip_scale.engine.planning.planner import Change
    from piip_scale.engine.zero.traffic import Collective


@dataclass(frozen=True)
class PlannedRun:
    """A run in its setting.

    Attributes:
        run: It, with what it left to memory decided.
        setting: Where.
        notes: What was changed or decided, a line each.
        asked: Memory and time of the run as it is.
        others: Of those that differ in one decision.
        best: The fastest that fits, if any.
        changes: What makes it fit.
        traffic: What a step sends.
        pace: Its steps.
    """

    run: RunConfig
    setting: Setting
    notes: tuple[str, ...]
    asked: Choice
    others: tuple[Choice, ...]
    best: Choice | None
    changes: tuple[Change, ...]
    traffic: tuple[Collective, ...]
    pace: Pace


def plan_run(
    run: RunConfig, setting: Setting, note: str, size_px: tuple[int, int] | None, flops: float | None
) -> PlannedRun:
    """Plans a run.

    Args:
        run: It, with steps that the setting's ranks can make.
        setting: Where.
        note: What was changed for that, if anything.
        size_px: Height and width of its images; training's largest where ``None``.
        flops: FLOP/s of a GPU at the speed asked for, if any.

    Raises:
        ConfigError: It cannot be, there or at all.
    """
    planner, ranks = setting.planner, setting.num_ranks
    laid_out, layout = _laid_out(run, setting)
    settled, checkpointing = _settled(laid_out, setting)
    chooser = setting.chooser(run.train.precision)
    asked = chooser.asked(settled)
    return PlannedRun(
        run=settled,
        setting=setting,
        notes=tuple(filter(None, [note, layout, checkpointing])),
        asked=asked,
        others=tuple(chooser.one_by_one(settled)),
        best=chooser.fastest(settled),
        changes=tuple(planner.changes(settled, ranks)),
        traffic=planner.traffic(settled, ranks),
        pace=Pace.of(settled, asked.memory, size_px, flops, setting.sets),
    )


def _laid_out(run: RunConfig, setting: Setting) -> tuple[RunConfig, str]:
    """With what ``zero.strategy="auto"`` left open decided, and a line on it."""
    from piip_scale.engine.layout_choice import layout_line

    if not (open_keys := run.zero.open_keys):
        return run, ""
    choice = setting.chooser(run.train.precision).fastest_layout(run, open_keys)
    line = layout_line(choice, setting.gpu.name, setting.network_gbps, setting.planner.capacity)
    return run.model_copy(update={"zero": run.zero.decided(choice.config.zero)}), line


def _settled(run: RunConfig, setting: Setting) -> tuple[RunConfig, str]:
    """With what ``checkpoint_blocks="auto"`` left open decided, and a line on it."""
    from piip_scale.engine.checkpoint_choice import leaves_open, settled_line

    settled = setting.planner.settled(run, setting.num_ranks)
    return settled, settled_line(settled, int(setting.planner.capacity)) if leaves_open(run) else ""
