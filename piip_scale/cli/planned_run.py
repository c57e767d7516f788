"""All that ``piip-scale plan`` finds of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from piip_scale.cli.pace import Pace
from piip_scale.errors import ConfigError

if TYPE_CHECKING:
    from piip_scale.cli.plan_setting import Setting
    from piip_scale.config import RunConfig
    from piip_scale.engine.planning.choices import Choice
    from piip_scale.engine.planning.cluster import Cluster
    from piip_scale.engine.planning.planner import Change
    from piip_scale.engine.zero.traffic import Collective


_TERA = 1e12


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
        without_copies: The same of runs whose saves write from no copies in host memory, where nothing else fits.
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
    without_copies: Choice | None
    changes: tuple[Change, ...]
    traffic: tuple[Collective, ...]
    pace: Pace


@dataclass(frozen=True)
class Asked:
    """What only the command knows of a run.

    Attributes:
        size_px: Height and width of its images; training's largest where ``None``.
        mfu: The speed asked for, if any.
        peak_tflops: What it is a share of; the GPU's where ``None``.
        epoch_images: Images of an epoch; those of the training set where ``None``.
    """

    size_px: tuple[int, int] | None = None
    mfu: float | None = None
    peak_tflops: float | None = None
    epoch_images: int | None = None

    def flops(self, cluster: Cluster) -> float | None:
        """FLOP/s of a GPU at the speed asked for.

        Raises:
            ConfigError: There is a peak, but no share of it.
        """
        if self.mfu is None:
            if self.peak_tflops is not None:
                rule, fix = "what --mfu is a share of", "add --mfu, or leave it out"
                raise ConfigError("--peak-tflops", value=self.peak_tflops, rule=rule, fix=fix)
            return None
        return self.mfu * (cluster.peak_flops if self.peak_tflops is None else self.peak_tflops * _TERA)


def plan_run(run: RunConfig, setting: Setting, note: str, command: Asked) -> PlannedRun:
    """Plans a run.

    Args:
        run: It, with steps that the setting's ranks can make.
        setting: Where.
        note: What was changed for that, if anything.
        command: What else was asked.

    Raises:
        ConfigError: It cannot be, there or at all.
    """
    planner, ranks = setting.planner, setting.num_ranks
    flops = command.flops(setting.cluster(run.train.precision))
    laid_out, layout = _laid_out(run, setting)
    settled, checkpointing = _settled(laid_out, setting)
    chooser = setting.chooser(run.train.precision)
    asked, best = chooser.asked(settled), chooser.fastest(settled)
    return PlannedRun(
        run=settled,
        setting=setting,
        notes=tuple(filter(None, [note, layout, checkpointing])),
        asked=asked,
        others=tuple(chooser.one_by_one(settled)),
        best=best,
        without_copies=None if best else chooser.fastest(_without_copies(settled)),
        changes=tuple(planner.changes(settled, ranks)),
        traffic=planner.traffic(settled, ranks),
        pace=Pace.of(settled, asked.memory, command.size_px, flops, setting.sets, command.epoch_images),
    )


def _without_copies(run: RunConfig) -> RunConfig:
    return run.model_copy(update={"train": run.train.model_copy(update={"background_saves": False})})


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
