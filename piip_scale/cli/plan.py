"""``piip-scale plan``: what a run needs of each GPU and how long it takes, before there is one."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from piip_scale.cli.options import ConfigPath, Overrides, read_size
from piip_scale.cli.pace import Pace

if TYPE_CHECKING:
    from piip_scale.config import RunConfig
    from piip_scale.data.reading.opened import OpenedSets
    from piip_scale.engine.gpus import Gpu
    from piip_scale.engine.planning.choices import Choice, Chooser
    from piip_scale.engine.planning.cluster import Assumptions, Cluster
    from piip_scale.engine.planning.planner import Change, Planner
    from piip_scale.engine.zero.traffic import Collective

_GIB = 2**30
_TERA = 1e12


def register(app: typer.Typer) -> None:
    """Adds this module's command."""
    app.command()(plan)


def plan(
    config: ConfigPath,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs of a node.")] = 8,
    gpu: Annotated[str, typer.Option(help="Kind of GPU: h100, h200, a100-80, a100-40, b200, l40s, rtx4090 ...")] = "",
    network_gbps: Annotated[
        float | None, typer.Option(min=0.001, help="Gb/s of a whole NODE to others; default: zero.network_gbps.")
    ] = None,
    measured: Annotated[
        Path | None, typer.Option(metavar="FILE", help="gpu.jsonl of benchmarks/gpu.py, in the place of assumptions.")
    ] = None,
    gpu_memory_gib: Annotated[
        float | None, typer.Option(min=1, help="Memory of a GPU; default: what --gpu has.")
    ] = None,
    host_memory_gib: Annotated[
        float | None, typer.Option(min=1, help="Memory of a node's host, to be checked.")
    ] = None,
    size: Annotated[str, typer.Option(metavar="HxW", help="Images in px; default: the largest in training.")] = "",
    mfu: Annotated[
        float | None,
        typer.Option(
            min=0.01,
            max=1,
            help="Print the time at this MFU, as training logs it.",
        ),
    ] = None,
    peak_tflops: Annotated[float, typer.Option(min=1, help="Peak of a GPU in the run's precision, for --mfu.")] = 989.0,
    sweep: Annotated[
        str, typer.Option(metavar="1,2,4,...", help="Numbers of nodes: print how the run scales, and draw it.")
    ] = "",
    png: Annotated[Path, typer.Option(help="Where --sweep draws.")] = Path("scaling.png"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON with exact numbers.")] = False,
    overrides: Overrides = None,
) -> None:
    """Plan a run's memory per GPU, its batch and its time, and report which setting helps if it does not fit.

    From the config alone: needs no GPU, no data and no memory for weights. The network's activations are counted by
    running its shapes; those of neck and heads, and 1.5 GiB for libraries, are estimates. Times are arithmetic on the
    GPU's data sheet and on assumptions, which are printed; `--measured` replaces them by a recording.

    Example: `piip-scale plan configs/coco/mask_rcnn_h6b_1024_512.py --nodes 2 --gpu h100 --network-gbps 400`
    """
    from piip_scale.cli.options import read_numbers
    from piip_scale.config.loading import load_config
    from piip_scale.data.reading.opened import OpenedSets
    from piip_scale.engine.batching import planned_batch
    from piip_scale.engine.planning.planner import Planner
    from piip_scale.tasks.counting import likely_classes
    from piip_scale.tasks.outline import outline_run

    kind, assumed = _gpu_of(gpu, measured)
    numbers = read_numbers(sweep) if sweep else [nodes]
    ranks = numbers[0] * gpus_per_node
    run, note = planned_batch(load_config(Path(config), overrides or []), ranks)
    size_px, sets = read_size(size) if size else None, OpenedSets()
    outline_of = partial(outline_run, num_classes=likely_classes(run, sets)[1], size_px=size_px)
    planner = Planner(outline_of, (gpu_memory_gib or kind.memory_gib) * _GIB, gpus_per_node)
    network = network_gbps or run.zero.network_gbps
    host = None if host_memory_gib is None else host_memory_gib * _GIB
    setting = _Setting(planner, kind, assumed, ranks, gpus_per_node, network, host, sets)
    if sweep:
        typer.echo("\n".join([*filter(None, [note]), *_swept(run, setting, numbers, config.stem, png)]))
        return
    found = _Found.of(run, setting, note, size_px, None if mfu is None else mfu * peak_tflops * _TERA)
    typer.echo(json.dumps(found.as_json(), indent=1) if as_json else "\n".join(found.lines()))


def _gpu_of(name: str, measured: Path | None) -> tuple[Gpu, Assumptions]:
    from piip_scale.engine.gpus import DEFAULT_GPU, gpu_named
    from piip_scale.engine.planning.cluster import Assumptions
    from piip_scale.engine.planning.measured import read_measured

    if measured is None:
        return gpu_named(name or DEFAULT_GPU), Assumptions()
    kind, assumed = read_measured(measured)
    return gpu_named(name) if name else kind, assumed


@dataclass(frozen=True)
class _Setting:
    """Where a run is planned for.

    Attributes:
        planner: Of its GPUs.
        gpu: Their kind.
        assumed: What its data sheet leaves open.
        num_ranks: GPUs.
        ranks_per_node: Of each node.
        network_gbps: Of a node.
        host_capacity: Bytes of a node's host memory, where it is known.
        sets: Its sets, as far as they are open.
    """

    planner: Planner
    gpu: Gpu
    assumed: Assumptions
    num_ranks: int
    ranks_per_node: int
    network_gbps: float
    host_capacity: float | None
    sets: OpenedSets

    def cluster(self, precision: str, num_ranks: int | None = None) -> Cluster:
        """For a run in that precision, on other ranks where they are given."""
        from piip_scale.engine.planning.cluster import gpu_cluster

        ranks = num_ranks or self.num_ranks
        return gpu_cluster(self.gpu, ranks, self.ranks_per_node, self.network_gbps, precision, self.assumed)

    def chooser(self, precision: str, num_ranks: int | None = None) -> Chooser:
        """Likewise."""
        from piip_scale.engine.planning.choices import Chooser

        return Chooser(self.planner, self.cluster(precision, num_ranks), self.host_capacity or math.inf)


def _swept(run: RunConfig, setting: _Setting, numbers: list[int], name: str, png: Path) -> list[str]:
    from piip_scale.cli.scaling_plot import plot_scaling
    from piip_scale.engine.layout_choice import layout_text
    from piip_scale.engine.planning.scaling import scaling, scaling_lines
    from piip_scale.engine.planning.time_lines import assumption_lines

    precision = run.train.precision
    points = list(scaling(run, numbers, setting.ranks_per_node, lambda ranks: setting.chooser(precision, ranks)))
    where = f"{setting.gpu.name}, {setting.ranks_per_node} a node, {setting.network_gbps:g} Gb/s a node"
    plot_scaling(points, f"{name}: planned, {where}", png)
    largest = setting.cluster(precision, points[-1].num_ranks)
    stated = assumption_lines(setting.gpu, largest, setting.network_gbps, setting.assumed)
    return [*stated, *scaling_lines(points, layout_text), f"drawn in {png}"]


@dataclass(frozen=True)
class _Found:
    """All that is planned of a run.

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
    setting: _Setting
    notes: tuple[str, ...]
    asked: Choice
    others: tuple[Choice, ...]
    best: Choice | None
    changes: tuple[Change, ...]
    traffic: tuple[Collective, ...]
    pace: Pace

    @classmethod
    def of(
        cls, run: RunConfig, setting: _Setting, note: str, size_px: tuple[int, int] | None, flops: float | None
    ) -> _Found:
        """Plans it."""
        from piip_scale.engine.checkpoint_choice import leaves_open, settled_line
        from piip_scale.engine.layout_choice import layout_line

        planner, ranks = setting.planner, setting.num_ranks
        chooser = setting.chooser(run.train.precision)
        layout = ""
        if open_keys := run.zero.open_keys:
            choice = chooser.fastest_layout(run, open_keys)
            run = run.model_copy(update={"zero": run.zero.decided(choice.config.zero)})
            layout = layout_line(choice, setting.gpu.name, setting.network_gbps, planner.capacity)
        settled = planner.settled(run, ranks)
        decided = settled_line(settled, int(planner.capacity)) if leaves_open(run) else ""
        asked = chooser.asked(settled)
        return cls(
            run=settled,
            setting=setting,
            notes=tuple(filter(None, [note, layout, decided])),
            asked=asked,
            others=tuple(chooser.one_by_one(settled)),
            best=chooser.fastest(settled),
            changes=tuple(planner.changes(settled, ranks)),
            traffic=planner.traffic(settled, ranks),
            pace=Pace.of(settled, asked.memory, size_px, flops, setting.sets),
        )

    def lines(self) -> list[str]:
        """For people."""
        from piip_scale.engine.batching import batch_line, shrunk_line
        from piip_scale.engine.planning.lines import change_lines, host_line, kept_blocks_line, memory_lines
        from piip_scale.engine.planning.time_lines import (
            assumption_lines,
            choice_lines,
            fastest_line,
            schedule_line,
            time_lines,
        )
        from piip_scale.engine.zero.traffic import traffic_lines

        run, setting, memory, pace = self.run, self.setting, self.asked.memory, self.pace
        ranks, per_node = setting.num_ranks, setting.ranks_per_node
        host = host_line(memory, per_node, setting.host_capacity)
        kept = kept_blocks_line(setting.planner.without_checkpoints(run, ranks), pace.recomputed_share)
        cluster = setting.cluster(run.train.precision)
        lines = [
            *(*self.notes, *memory_lines(memory), kept, host, *change_lines(memory, self.changes)),
            *traffic_lines(self.traffic, per_node),
            *(shrunk_line(run, ranks), batch_line(run, ranks), *pace.lines()),
            *assumption_lines(setting.gpu, cluster, setting.network_gbps, setting.assumed),
            *(*time_lines(self.asked.time), schedule_line(self.asked.time, pace.steps)),
            *(*choice_lines(self.asked, self.others), fastest_line(self.asked, self.best)),
        ]
        return [line for line in lines if line]

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        ways = [{"knob": change.knob, "total": change.plan.total, "fits": change.plan.fits} for change in self.changes]
        return asdict(self.asked.memory) | {
            "total": self.asked.memory.total,
            "fits": self.asked.memory.fits,
            "changes": ways,
            "traffic": _sent(self.traffic, self.setting.ranks_per_node),
            "pace": asdict(self.pace),
            "gpu": asdict(self.setting.gpu),
            "network_gbps_of_a_node": self.setting.network_gbps,
            "time": asdict(self.asked.time) | _choice_as_json(self.asked),
            "choices": [_choice_as_json(choice) for choice in self.others],
            "fastest": None if self.best is None else _choice_as_json(self.best),
        }


def _choice_as_json(choice: Choice) -> dict[str, Any]:
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


def _sent(traffic: Sequence[Collective], ranks_per_node: int) -> list[dict[str, Any]]:
    return [
        asdict(each) | {"inside": each.inside(ranks_per_node), "between": each.between(ranks_per_node)}
        for each in traffic
    ]
