"""Step times by layout on nodes with a limited network between them, against those that planning predicts."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.distributed as dist
from scipy.optimize import nnls

from piip_scale.config.detection import DetectionRun
from piip_scale.config.run import RunConfig
from piip_scale.engine.batching import scale_to_ranks
from piip_scale.engine.planning.choices import layouts_of
from piip_scale.engine.planning.cluster import GLOO, Cluster, cpu_cluster
from piip_scale.engine.planning.planner import Planner
from piip_scale.engine.step import train_step
from piip_scale.engine.zero.setup import build_engine
from piip_scale.engine.zero.traffic import PASSES, Collective
from piip_scale.tasks.base import Outline
from piip_scale.tasks.outline import outline_run
from piip_scale.world import World
from sections.nodes import bytes_to_others, limit_rate, run_nodes
from sections.record import table
from sections.subject import NUM_CLASSES, SIZE_PX, build, detector_config, made_up_batch

_STEPS, _STEPS_OF_MANY, _UNLIMITED = 3, 2, 20_000
_CLOSE = 0.2
_SMALL = 1e-12
_MEGA, _GIGA = 1e6, 1e9
# Nothing stays gathered for reuse, as in a model far larger than a device: what plans count.
_RELEASED = {
    "zero_optimization": {
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 0,
    }
}


@dataclass(frozen=True)
class Setting:
    """What a user finds there, and must choose a layout for.

    Attributes:
        num_nodes: Nodes.
        ranks_per_node: Of each.
        megabits_per_s: Of a node to others.
        accumulation: Micro-batches of a step.
        large_dim: Width of the large branch.
        depth: Of both branches.
        checkpointed: Both compute their blocks again.
    """

    num_nodes: int
    ranks_per_node: int
    megabits_per_s: float
    accumulation: int = 1
    large_dim: int = 256
    depth: int = 4
    checkpointed: bool = False

    def __str__(self) -> str:
        rate = f", {self.megabits_per_s:g} Mb/s" if self.num_nodes > 1 else ""
        more = ", checkpointed" if self.checkpointed else ""
        size = f"{self.large_dim} wide, {self.depth} deep"
        return f"{self.num_nodes} x {self.ranks_per_node}{rate}, {self.accumulation} micro, {size}{more}"

    @property
    def num_ranks(self) -> int:
        """Of all nodes."""
        return self.num_nodes * self.ranks_per_node

    @property
    def ranks_per_core(self) -> float:
        """Of this machine, which plays all nodes; those that share one take as many times longer."""
        return max(1.0, self.num_ranks / (os.cpu_count() or 1))

    @property
    def layouts(self) -> dict[str, dict[str, Any]]:
        """Sections ``zero`` by name: all that ``auto`` chooses among, but those that offload from host to host."""
        return {
            _name(each): each | ({"deepspeed": _RELEASED} if each["stage"] == 3 else {})
            for each in layouts_of(self.num_ranks, self.ranks_per_node)
            if "offload_optimizer" not in each
        }


def _name(changes: dict[str, Any]) -> str:
    """A layout by what is particular about it."""
    others = {key: value for key, value in changes.items() if key != "stage"} or changes
    return ", ".join(f"{key}={value!r}" for key, value in others.items())


SETTINGS = (
    *(Setting(2, 2, rate, micros) for micros in (1, 4) for rate in (150, 300, 600, 1200)),
    *(Setting(4, 1, rate) for rate in (150, 600)),
    Setting(1, 4, _UNLIMITED),
    Setting(2, 1, 300),
    *(Setting(2, 2, rate, large_dim=512, depth=2) for rate in (300, 1200)),
    Setting(2, 2, 600, large_dim=128, depth=8),
    Setting(2, 2, 300, checkpointed=True),
    # Measured when the plan was as it is: nothing in it comes from these.
    Setting(2, 2, 450),
    Setting(2, 2, 900, 2),
    Setting(2, 2, 450, large_dim=384),
    Setting(4, 1, 300),
)
CALIBRATED = Setting(2, 2, 600)


@dataclass(frozen=True)
class Measured:
    """Of a layout in a setting: seconds of a step, and MB that a node sent to others in it."""

    seconds: float
    megabytes: float


@cache
def _config(setting: Setting, layout: str) -> DetectionRun:
    return detector_config(
        large_dim=setting.large_dim,
        depth=setting.depth,
        checkpoint_blocks=setting.checkpointed,
        zero=setting.layouts[layout],
        train={"steps": 1000, "precision": "fp32", "gradient_accumulation": setting.accumulation},
    )


def measured(world: World, device: torch.device, settings: Sequence[Setting]) -> dict[tuple[Setting, str], Measured]:
    """Every rank calls this; settings differ in their rates alone, for all of which a layout is built once."""
    found = {}
    for name in settings[0].layouts:
        limit_rate(world, _UNLIMITED)
        config = scale_to_ranks(_config(settings[0], name), world.num_ranks)
        engine, _ = build_engine(build(cast(DetectionRun, config)), config, world)
        batches = [made_up_batch(world.rank + micro) for micro in range(config.train.gradient_accumulation)]
        _step(engine, batches, world)
        for setting in settings:
            limit_rate(world, setting.megabits_per_s)
            taken = [
                _step(engine, batches, world) for _ in range(_STEPS if setting.accumulation == 1 else _STEPS_OF_MANY)
            ]
            found[setting, name] = min(taken, key=lambda each: each.seconds)
            if world.is_main:
                print(setting, name, found[setting, name], flush=True)
        engine.destroy()
    return found


def _step(engine: Any, batches: Sequence[Any], world: World) -> Measured:
    dist.barrier()
    begun_s, before = time.perf_counter(), bytes_to_others()
    train_step(engine, iter(batches), 0, 0, world)
    dist.barrier()
    return Measured(time.perf_counter() - begun_s, (bytes_to_others() - before) / _MEGA)


class Rates(NamedTuple):
    """Of ranks that have a core of their own, beside what planning takes a free core for.

    Attributes:
        slowness: How many times longer a rank computes.
        message_s: What a message costs its host; see ``Cluster``.
        byte_s: What a byte of a message does.
    """

    slowness: float
    message_s: float
    byte_s: float


_NOTHING = Rates(0.0, 0.0, 0.0)
_UNITS = (Rates(1.0, 0.0, 0.0), Rates(0.0, 1.0, 0.0), Rates(0.0, 0.0, 1.0))


class Predictions:
    """What planning predicts, with three rates that bring the layouts of one setting nearest to what was measured.

    Args:
        layouts: Seconds of a step by layout, measured in the calibrated setting.

    Attributes:
        rates: Those.
    """

    def __init__(self, layouts: Mapping[str, float]) -> None:
        self._planners: dict[int, Planner] = {}
        self.rates = Rates(*self._fitted(layouts))

    def _fitted(self, layouts: Mapping[str, float]) -> Iterable[float]:
        """Shares of the measured time are fitted; a step that is twice as long counts as much."""
        shares, rest = [], []
        for layout, measured_s in layouts.items():
            network_s = self._seconds_at(_NOTHING, layout)
            shares.append([(self._seconds_at(unit, layout) - network_s) / measured_s for unit in _UNITS])
            rest.append(1 - network_s / measured_s)
        return (float(rate) for rate in nnls(np.array(shares), np.array(rest))[0])

    def _seconds_at(self, rates: Rates, layout: str) -> float:
        return self._seconds(CALIBRATED, layout, self._cluster(CALIBRATED, rates))

    def seconds(self, setting: Setting, layout: str) -> float:
        """Of a step."""
        return self._seconds(setting, layout, self._cluster(setting, self.rates))

    def megabytes(self, setting: Setting, layout: str) -> float:
        """That a node sends to others in a step, as rings send it."""
        traffic = self._traffic(setting, layout)
        # torch's reduce-scatter over gloo is an all-reduce.
        each = ((one, GLOO.passes[one.kind] / PASSES[one.kind]) for one in traffic)
        return sum(passes * one.between(setting.ranks_per_node) for one, passes in each) / _MEGA

    def auto(self, setting: Setting) -> str:
        """The layout that ``auto`` takes there, with its own assumptions about CPUs and nothing of what is fitted."""
        seconds = {name: self._seconds(setting, name, _plain_cluster(setting)) for name in setting.layouts}
        return min(seconds, key=seconds.__getitem__)

    def _seconds(self, setting: Setting, layout: str, cluster: Cluster) -> float:
        return self._planner(setting).step_time(_config(setting, layout), cluster).seconds

    def _traffic(self, setting: Setting, layout: str) -> Sequence[Collective]:
        return self._planner(setting).traffic(_config(setting, layout), setting.num_ranks)

    def _cluster(self, setting: Setting, rates: Rates) -> Cluster:
        plain, slowness = _plain_cluster(setting), max(_SMALL, rates.slowness)
        return replace(
            plain,
            flops=plain.flops / slowness,
            fp32_flops=plain.fp32_flops / slowness,
            memory_bytes_per_s=plain.memory_bytes_per_s / slowness,
            operator_s=plain.operator_s * slowness,
            message_s=rates.message_s * setting.ranks_per_core,
            socket_bytes_per_s=1 / max(_SMALL, rates.byte_s * setting.ranks_per_core),
        )

    def _planner(self, setting: Setting) -> Planner:
        if setting.ranks_per_node not in self._planners:
            self._planners[setting.ranks_per_node] = Planner(_outline, float("inf"), setting.ranks_per_node)
        return self._planners[setting.ranks_per_node]


def _plain_cluster(setting: Setting) -> Cluster:
    gigabits_per_s = setting.megabits_per_s * _MEGA / _GIGA
    return cpu_cluster(setting.num_ranks, setting.ranks_per_node, gigabits_per_s, setting.ranks_per_core)


def _outline(config: RunConfig) -> Outline:
    return outline_run(config, NUM_CLASSES, (SIZE_PX, SIZE_PX))


def measure_all(settings: Iterable[Setting] = SETTINGS) -> dict[tuple[Setting, str], Measured]:
    """All settings, those that differ by their rates on the same ranks."""
    together: dict[Setting, list[Setting]] = {}
    for setting in settings:
        together.setdefault(replace(setting, megabits_per_s=0), []).append(setting)
    found: dict[tuple[Setting, str], Measured] = {}
    for common, own in together.items():
        found |= run_nodes(common.num_nodes, common.ranks_per_node, measured, own)[0]
    return found


_TEXT = (
    "Ranks on this machine's cores as nodes: network namespaces, whose links tc limits to a rate. A detector with a "
    "large branch and a small one of a quarter of its width in float32 over gloo, nothing prefetched or kept for "
    "reuse; the fastest of {steps} steps, or of {steps_of_many} with many micro-batches. MB are what a node sends to "
    "others in a step, by its link's counter, headers included. Predicted is what `plan` reckons with. Three rates are "
    "set once, by the layouts of {calibrated}: a rank with a core of its own computes {rates.slowness:.2f} times as "
    "long as `plan` takes it to, a message costs it {message_ms:.1f} ms, a byte of one {byte_ns:.1f} ns; ranks that "
    'share a core take as many times longer for all three. Auto is what `zero.strategy="auto"` takes, with nothing '
    "set; stage 0 is open to it in float32 only."
)


def section() -> str:
    """Measures all settings."""
    return report(measure_all())


def report(found: Mapping[tuple[Setting, str], Measured]) -> str:
    """Measured beside predicted, and whether the layout that is predicted to be the fastest was."""
    by_setting: dict[Setting, dict[str, Measured]] = {}
    for (setting, layout), one in found.items():
        by_setting.setdefault(setting, {})[layout] = one
    predictions = Predictions({layout: one.seconds for layout, one in by_setting[CALIBRATED].items()})
    choices = [_Choice(setting, own, predictions) for setting, own in by_setting.items()]
    errors = [error for choice in choices for error in choice.errors.values()]
    close = sum(abs(error) <= _CLOSE for error in errors)
    head = ["setting", "layout", "MB", "predicted", "s", "predicted", "", ""]
    text = _TEXT.format(
        steps=_STEPS,
        steps_of_many=_STEPS_OF_MANY,
        calibrated=CALIBRATED,
        rates=predictions.rates,
        message_ms=1e3 * predictions.rates.message_s,
        byte_ns=1e9 * predictions.rates.byte_s,
    )
    return (
        f"{text}\n\nOf {len(errors)} step times {close} are predicted within {_CLOSE:.0%}, the worst is "
        f"{max(errors, key=abs):+.0%}. The layout that is predicted to be the fastest "
        f"{_score([choice.loss(choice.pick) for choice in choices])}. The layout that auto takes "
        f"{_score([choice.loss(choice.auto) for choice in choices])}.\n\n"
        + table(head, [row for choice in choices for row in choice.rows()])
    )


class _Choice:
    """The layouts of one setting: seconds measured and predicted, and which is taken by what."""

    def __init__(self, setting: Setting, own: Mapping[str, Measured], predictions: Predictions) -> None:
        self._setting, self._own = setting, own
        self._seconds = {layout: predictions.seconds(setting, layout) for layout in own}
        self._megabytes = {layout: predictions.megabytes(setting, layout) for layout in own}
        self.pick, self.auto = min(own, key=self._seconds.__getitem__), predictions.auto(setting)
        self._fastest = min(own, key=lambda layout: own[layout].seconds)
        self.errors = {layout: self._seconds[layout] / one.seconds - 1 for layout, one in own.items()}

    def loss(self, layout: str) -> float:
        """By how much a layout takes longer than the fastest."""
        return self._own[layout].seconds / self._own[self._fastest].seconds - 1

    def rows(self) -> list[list[str]]:
        """One a layout."""
        marks = {"fastest": self._fastest, "picked": self.pick, "auto": self.auto}
        return [
            [
                str(self._setting),
                layout,
                *(f"{megabytes:.1f}" for megabytes in (one.megabytes, self._megabytes[layout])),
                *(f"{seconds:.2f}" for seconds in (one.seconds, self._seconds[layout])),
                f"{self.errors[layout]:+.0%}",
                ", ".join(mark for mark, of in marks.items() if of == layout),
            ]
            for layout, one in self._own.items()
        ]


def _score(losses: Sequence[float]) -> str:
    best = sum(loss == 0 for loss in losses)
    return f"is it in {best} of {len(losses)} settings, and takes up to {max(losses):.0%} longer where it is not"
