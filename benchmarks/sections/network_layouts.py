"""Step times by layout on nodes with a limited network between them, against those that planning predicts."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn

from piip_scale.config.detection import DetectionRun
from piip_scale.config.run import RunConfig
from piip_scale.engine.batching import scale_to_ranks
from piip_scale.engine.planning.cluster import GLOO, Cluster, Link
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

_STEPS, _UNLIMITED = 2, 20_000
_CLOSE = 0.2
_ROUNDS, _HALVINGS, _SLOWNESS = 3, 16, (1e-2, 1e2)
_MEGA, _BITS, _WIDTH, _DEPTH = 1e6, 8, 256, 4
# Nothing stays gathered for reuse, as in a model far larger than a device: what plans count.
_RELEASED = {
    "zero_optimization": {
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 0,
    }
}
_WHOLE = {f"stage {stage}": {"stage": stage} for stage in (0, 1, 2)}
_FLAT = {"stage 3": {"stage": 3, "deepspeed": _RELEASED}}
_BY_NODE = {
    "stage 3 in a node": {"stage": 3, "deepspeed": _RELEASED, "shard_over": "node"},
    "hpZ": {"stage": 3, "deepspeed": _RELEASED, "node_partition": 2},
}


@dataclass(frozen=True)
class Setting:
    """What a user finds there, and must choose a layout for.

    Attributes:
        num_nodes: Nodes.
        ranks_per_node: Of each.
        megabits_per_s: Of a node to others.
        accumulation: Micro-batches of a step.
    """

    num_nodes: int
    ranks_per_node: int
    megabits_per_s: float
    accumulation: int

    def __str__(self) -> str:
        return f"{self.num_nodes} x {self.ranks_per_node}, {self.megabits_per_s:g} Mb/s, {self.accumulation} micro"

    @property
    def layouts(self) -> dict[str, dict[str, Any]]:
        """Sections ``zero`` by name; in nodes of one rank there is nothing to shard by node."""
        return _WHOLE | _FLAT | (_BY_NODE if self.ranks_per_node > 1 and self.num_nodes > 1 else {})


SETTINGS = (
    *(Setting(2, 2, rate, micros) for micros in (1, 4) for rate in (150, 300, 600, 1200)),
    Setting(4, 1, 150, 1),
    Setting(4, 1, 600, 1),
)
CALIBRATED = Setting(2, 2, 300, 1)
_FEW, _MANY = "stage 0", "stage 3"


@dataclass(frozen=True)
class Measured:
    """Of a layout in a setting: seconds of a step, and MB that a node sent to others in it."""

    seconds: float
    megabytes: float


@cache
def _config(setting: Setting, layout: str) -> DetectionRun:
    return config_of(setting.layouts[layout], setting.accumulation)


def config_of(zero: dict[str, Any], accumulation: int) -> DetectionRun:
    """A small detector with a large branch twice as deep and four times as wide as the other."""
    return detector_config(
        large_dim=_WIDTH,
        depth=_DEPTH,
        zero=zero,
        train={"steps": 1000, "precision": "fp32", "gradient_accumulation": accumulation},
    )


class _Built:
    """As much of a task as building takes."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def build_model(self) -> nn.Module:
        """The model."""
        return self._model


def measured(world: World, device: torch.device, settings: Sequence[Setting]) -> dict[tuple[Setting, str], Measured]:
    """Every rank calls this; settings differ in their rates alone, for all of which a layout is built once."""
    found = {}
    for name, zero in settings[0].layouts.items():
        limit_rate(world, _UNLIMITED)
        config = scale_to_ranks(config_of(zero, settings[0].accumulation), world.num_ranks)
        engine, _ = build_engine(build(cast(DetectionRun, config)), config, world)
        batches = [made_up_batch(world.rank + micro) for micro in range(config.train.gradient_accumulation)]
        _step(engine, batches, world)
        for setting in settings:
            limit_rate(world, setting.megabits_per_s)
            taken = [_step(engine, batches, world) for _ in range(_STEPS if setting.accumulation == 1 else 1)]
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


class Predictions:
    """What planning predicts, with two rates set so that two layouts of one setting come out as measured.

    Args:
        layouts: Seconds of a step measured in the calibrated setting; of stage 0, which sends few messages, and of
            stage 3, which sends many.

    Attributes:
        slowness: How many times longer a rank computes than planning takes for a free core.
        message_s: What a message costs the host; see ``Cluster``.
    """

    def __init__(self, layouts: Mapping[str, float]) -> None:
        self._planners: dict[int, Planner] = {}
        self.slowness, self.message_s = 1.0, 0.0
        few, many = (CALIBRATED, _FEW), (CALIBRATED, _MANY)
        for _ in range(_ROUNDS):
            self._fit(few, layouts[_FEW])
            self.message_s += (layouts[_MANY] - self.seconds(*many)) / self.messages(*many)

    def _fit(self, configuration: tuple[Setting, str], seconds: float) -> None:
        low, high = _SLOWNESS
        for _ in range(_HALVINGS):
            self.slowness = (low * high) ** 0.5
            low, high = (low, self.slowness) if self.seconds(*configuration) > seconds else (self.slowness, high)

    def seconds(self, setting: Setting, layout: str) -> float:
        """Of a step."""
        return self._planner(setting).step_time(_config(setting, layout), self._cluster(setting)).seconds

    def messages(self, setting: Setting, layout: str) -> int:
        """That a rank takes part in in a step."""
        return sum(each.per_step * each.messages for each in self._traffic(setting, layout))

    def megabytes(self, setting: Setting, layout: str) -> float:
        """That a node sends to others in a step, as rings send it."""
        traffic = self._traffic(setting, layout)
        # torch's reduce-scatter over gloo is an all-reduce.
        each = ((one, GLOO.passes[one.kind] / PASSES[one.kind]) for one in traffic)
        return sum(passes * one.between(setting.ranks_per_node) for one, passes in each) / _MEGA

    def _traffic(self, setting: Setting, layout: str) -> Sequence[Collective]:
        return self._planner(setting).traffic(_config(setting, layout), setting.num_nodes * setting.ranks_per_node)

    def _cluster(self, setting: Setting) -> Cluster:
        return Cluster(
            num_ranks=setting.num_nodes * setting.ranks_per_node,
            ranks_per_node=setting.ranks_per_node,
            flops=50e9 / self.slowness,
            fp32_flops=50e9 / self.slowness,
            inner=Link(1e9, 1e-4),
            outer=Link(setting.megabits_per_s * _MEGA / _BITS, 1e-4),
            memory_bytes_per_s=10e9 / self.slowness,
            operator_s=2.65e-5 * self.slowness,
            message_s=self.message_s,
            asynchronous=False,
            # Without prefetching nothing of a gather hides.
            transport=replace(GLOO, hides=dict.fromkeys(GLOO.hides, False)),
        )

    def _planner(self, setting: Setting) -> Planner:
        if setting.ranks_per_node not in self._planners:
            self._planners[setting.ranks_per_node] = Planner(_outline, float("inf"), setting.ranks_per_node)
        return self._planners[setting.ranks_per_node]


def _outline(config: RunConfig) -> Outline:
    return outline_run(config, NUM_CLASSES, (SIZE_PX, SIZE_PX))


def measure_all(settings: Iterable[Setting] = SETTINGS) -> dict[tuple[Setting, str], Measured]:
    """All settings, those of a shape on the same ranks."""
    together: dict[tuple[int, int, int], list[Setting]] = {}
    for setting in settings:
        key = (setting.num_nodes, setting.ranks_per_node, setting.accumulation)
        together.setdefault(key, []).append(setting)
    found: dict[tuple[Setting, str], Measured] = {}
    for (num_nodes, ranks_per_node, _), own in together.items():
        found |= run_nodes(num_nodes, ranks_per_node, measured, own)[0]
    return found


_TEXT = (
    "Four ranks on this machine's cores as 2 nodes of 2 or 4 nodes of 1: network namespaces, whose links tc limits to "
    "a rate. A detector with a large branch of 256 and a small one of 64 dimensions in float32 over gloo, nothing "
    "prefetched or kept for reuse; the faster of two steps, or one of four micro-batches. MB are what a node sends to "
    "others in a step, by its link's counter, headers included. Predicted is what `plan` reckons with; its "
    "rates are set once, by stage 0 and stage 3 at {calibrated}: a rank computes {slowness:.1f} times longer than a "
    "free core, and a message costs {message_ms:.0f} ms."
)


def section() -> str:
    """Measures all settings."""
    return report(measure_all())


def report(found: Mapping[tuple[Setting, str], Measured]) -> str:
    """Measured beside predicted, and whether the layout that is predicted to be the fastest was."""
    predictions = Predictions({layout: found[CALIBRATED, layout].seconds for layout in (_FEW, _MANY)})
    rows, errors, picks = [], [], []
    for setting in dict.fromkeys(setting for setting, _ in found):
        own = {layout: one for (of, layout), one in found.items() if of == setting}
        seconds = {layout: predictions.seconds(setting, layout) for layout in own}
        pick, fastest = min(seconds, key=seconds.__getitem__), min(own, key=lambda layout: own[layout].seconds)
        picks.append(own[pick].seconds / own[fastest].seconds)
        for layout, one in own.items():
            errors.append(seconds[layout] / one.seconds - 1)
            mark = "fastest" * (layout == fastest) + ", picked" * (layout == pick)
            sent = (one.megabytes, predictions.megabytes(setting, layout))
            cells = [str(setting), layout, *(f"{x:.1f}" for x in sent), f"{one.seconds:.2f}"]
            rows.append([*cells, f"{seconds[layout]:.2f}", f"{errors[-1]:+.0%}", mark.removeprefix(", ")])
    close = sum(abs(error) <= _CLOSE for error in errors)
    best = sum(loss == 1 for loss in picks)
    head = ["setting", "layout", "MB", "predicted", "s", "predicted", "", ""]
    text = _TEXT.format(calibrated=CALIBRATED, slowness=predictions.slowness, message_ms=1e3 * predictions.message_s)
    return (
        f"{text}\n\nOf {len(errors)} step times {close} are predicted within {_CLOSE:.0%}, the worst is "
        f"{max(errors, key=abs):+.0%}. "
        f"The layout that is predicted to be the fastest is it in {best} of {len(picks)} settings; where it is not, it "
        f"takes up to {max(picks) - 1:.0%} longer than the fastest.\n\n{table(head, rows)}"
    )
