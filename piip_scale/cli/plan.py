"""``piip-scale plan``: what a run needs of each GPU, before there is one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from piip_scale.cli.options import ConfigPath, Overrides, read_size

if TYPE_CHECKING:
    from piip_scale.config import RunConfig
    from piip_scale.engine.planning.memory import MemoryPlan
    from piip_scale.engine.planning.planner import Change
    from piip_scale.engine.zero.traffic import Collective

_GIB = 2**30
_TERA = 1e12
_HOUR_S = 3600


def register(app: typer.Typer) -> None:
    """Adds this module's command."""
    app.command()(plan)


def plan(
    config: ConfigPath,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs of a node.")] = 8,
    gpu_memory_gib: Annotated[float, typer.Option(min=1, help="Memory of a GPU.")] = 80.0,
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
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON with exact numbers.")] = False,
    overrides: Overrides = None,
) -> None:
    """Plan a run's memory per GPU, its batch and its time, and report which setting helps if it does not fit.

    From the config alone: needs no GPU, no data and no memory for weights. The network's activations are counted by
    running its shapes; those of neck and heads, and 1.5 GiB for libraries, are estimates.

    Example: `piip-scale plan configs/coco/mask_rcnn_h6b_1024_512.py --gpus-per-node 8 --gpu-memory-gib 80`
    """
    from piip_scale.config.loading import load_config
    from piip_scale.engine.batching import batch_line, shrunk_line
    from piip_scale.engine.checkpoint_choice import leaves_open, settled_line
    from piip_scale.engine.planning.lines import change_lines, host_line, kept_blocks_line, memory_lines
    from piip_scale.engine.planning.planner import Planner
    from piip_scale.engine.zero.traffic import traffic_lines
    from piip_scale.tasks.counting import likely_classes
    from piip_scale.tasks.outline import outline_run

    run = load_config(Path(config), overrides or [])
    size_px = read_size(size) if size else None
    outline_of = partial(outline_run, num_classes=likely_classes(run)[1], size_px=size_px)
    planner, ranks = Planner(outline_of, gpu_memory_gib * _GIB, gpus_per_node), nodes * gpus_per_node
    settled = [settled_line(planner.settled(run, ranks), int(gpu_memory_gib * _GIB))] if leaves_open(run) else []
    run = planner.settled(run, ranks)
    found, changes = planner.plan(run, ranks), planner.changes(run, ranks)
    traffic = planner.traffic(run, ranks)
    pace = Pace.of(run, found, size_px, None if mfu is None else mfu * peak_tflops * _TERA)
    if as_json:
        typer.echo(json.dumps(_as_json(found, changes, pace, _sent(traffic, gpus_per_node)), indent=1))
    else:
        host = host_line(found, gpus_per_node, None if host_memory_gib is None else host_memory_gib * _GIB)
        kept = kept_blocks_line(planner.without_checkpoints(run, ranks), pace.recomputed_share)
        lines = [*settled, *memory_lines(found), *filter(None, [kept, host]), *change_lines(found, changes)]
        batch = [*filter(None, [shrunk_line(run, ranks)]), batch_line(run, ranks)]
        typer.echo("\n".join([*lines, *traffic_lines(traffic, gpus_per_node), *batch, *pace.lines()]))


@dataclass(frozen=True)
class Pace:
    """A run's steps and their cost.

    Attributes:
        images_per_step: On all GPUs.
        steps_per_epoch: ``None`` where the training shards are not there.
        flops_per_image: Model FLOPs of the network in a training step, as training logs them and its MFU: as far as
            it is trained, without neck and heads and what checkpointing computes again.
        head_flops_per_image: Those of neck and heads, in float32.
        recomputed_flops_per_image: What checkpointed blocks compute a second time.
        seconds_per_step: At the speed asked for.
    """

    images_per_step: int
    steps_per_epoch: int | None
    flops_per_image: int
    head_flops_per_image: int
    recomputed_flops_per_image: int
    seconds_per_step: float | None

    @classmethod
    def of(cls, run: RunConfig, plan: MemoryPlan, size_px: tuple[int, int] | None, flops: float | None) -> Pace:
        """The pace of a run whose every GPU does so many FLOP/s; images of ``size_px``, or as large as training's."""
        from piip_scale.tasks.counting import head_flops, likely_classes, network_flops, recomputed_flops
        from piip_scale.tasks.outline import training_size_px

        classes, size = likely_classes(run)[1], size_px or training_size_px(run)
        network, heads = network_flops(run, classes, *size), head_flops(run, classes, *size)
        seconds = None if flops is None else network * plan.images_per_step / (plan.num_ranks * flops)
        again = recomputed_flops(run, classes, *size)
        return cls(plan.images_per_step, _steps_per_epoch(run, plan), network, heads, again, seconds)

    @property
    def recomputed_share(self) -> float:
        """Of the arithmetic of the network's step, without neck and heads."""
        again = self.recomputed_flops_per_image
        return again / (self.flops_per_image + again)

    def lines(self) -> list[str]:
        """For the user."""
        steps = "" if self.steps_per_epoch is None else f", {self.steps_per_epoch:,} steps an epoch"
        flops = f"{self.flops_per_image / _TERA:.2f} TFLOP an image"
        heads = f"{self.head_flops_per_image / _TERA:.2f} more in neck and heads, which MFU leaves out"
        lines = [f"{self.images_per_step} images a step{steps}; {flops}, {heads}"]
        if (seconds := self.seconds_per_step) is not None:
            hours = None if self.steps_per_epoch is None else self.steps_per_epoch * seconds / _HOUR_S
            epoch = "" if hours is None else f", {hours:.2f} h an epoch"
            lines.append(f"at that speed {seconds:.2f} s a step, {self.images_per_step / seconds:.1f} images/s{epoch}")
        return lines


def _steps_per_epoch(run: RunConfig, plan: MemoryPlan) -> int | None:
    from piip_scale.data.reading.set_files import has_manifest
    from piip_scale.data.reading.shards import ShardSet
    from piip_scale.data.stream import epoch_size

    data = run.data
    if not has_manifest(data.train_shards, data.cache):
        return None
    shards = ShardSet.open(data.train_shards, data.classes, cache=data.cache, max_pixels=data.max_pixels)
    return epoch_size(shards, data) // plan.images_per_step


def _sent(traffic: Sequence[Collective], ranks_per_node: int) -> list[dict[str, Any]]:
    return [
        asdict(each) | {"inside": each.inside(ranks_per_node), "between": each.between(ranks_per_node)}
        for each in traffic
    ]


def _as_json(
    plan: MemoryPlan, changes: Sequence[Change], pace: Pace, traffic: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    ways = [{"knob": change.knob, "total": change.plan.total, "fits": change.plan.fits} for change in changes]
    return asdict(plan) | {
        "total": plan.total,
        "fits": plan.fits,
        "changes": ways,
        "traffic": traffic,
        "pace": asdict(pace),
    }
