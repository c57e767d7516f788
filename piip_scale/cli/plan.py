"""``piip-scale plan``: what a run needs of each GPU and how long it takes, before there is one."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from piip_scale.cli.options import ConfigPath, Overrides, read_numbers, read_size
from piip_scale.cli.plan_options import (
    AsJson,
    EpochImages,
    GpuKind,
    GpuMemory,
    GpusOfNode,
    HostMemory,
    ImageSize,
    Measured,
    Mfu,
    NetworkGbps,
    Nodes,
    PeakTflops,
    Png,
    Sweep,
    gpu_asked,
    refuse_beside_sweep,
)

if TYPE_CHECKING:
    from piip_scale.cli.plan_setting import Setting
    from piip_scale.config import RunConfig

_GIB = 2**30


def register(app: typer.Typer) -> None:
    """Adds this module's command."""
    app.command()(plan)


def plan(
    config: ConfigPath,
    nodes: Nodes = None,
    gpus_per_node: GpusOfNode = 8,
    gpu: GpuKind = "",
    network_gbps: NetworkGbps = None,
    measured: Measured = None,
    gpu_memory_gib: GpuMemory = None,
    host_memory_gib: HostMemory = None,
    size: ImageSize = "",
    mfu: Mfu = None,
    peak_tflops: PeakTflops = None,
    epoch_images: EpochImages = None,
    sweep: Sweep = "",
    png: Png = Path("scaling.png"),
    as_json: AsJson = False,
    overrides: Overrides = None,
) -> None:
    """Plan a run's memory per GPU, its batch and its time, and report which setting helps if it does not fit.

    From the config alone: needs no GPU, no data and no memory for weights. The network's activations are counted by
    running its shapes; those of neck and heads, and 1.5 GiB for libraries, are estimates. Times are arithmetic on the
    GPU's data sheet and on assumptions, which are printed; `--measured` replaces them by a recording.

    Example: `piip-scale plan configs/coco/mask_rcnn_h6b_1024_512.py --nodes 2 --gpu h100 --network-gbps 400`
    """
    from piip_scale.cli.plan_json import plan_json
    from piip_scale.cli.plan_setting import Setting
    from piip_scale.cli.plan_tables import plan_lines
    from piip_scale.cli.planned_run import Asked, plan_run
    from piip_scale.config.loading import load_config
    from piip_scale.data.reading.opened import OpenedSets
    from piip_scale.engine.batching import planned_batch
    from piip_scale.engine.planning.planner import Planner
    from piip_scale.tasks.counting import likely_classes
    from piip_scale.tasks.outline import outline_run

    if sweep:
        refuse_beside_sweep(nodes=nodes, mfu=mfu, peak_tflops=peak_tflops, epoch_images=epoch_images)
    kind, assumed = gpu_asked(gpu, measured)
    numbers, size_px = read_numbers(sweep) if sweep else [nodes or 1], read_size(size) if size else None
    ranks, sets = numbers[0] * gpus_per_node, OpenedSets()
    run, note = planned_batch(load_config(config, overrides or []), ranks)
    outline_of = partial(outline_run, num_classes=likely_classes(run, sets)[1], size_px=size_px)
    planner = Planner(outline_of, (gpu_memory_gib or kind.memory_gib) * _GIB, gpus_per_node)
    network = network_gbps or run.zero.network_gbps
    host = None if host_memory_gib is None else host_memory_gib * _GIB
    setting = Setting(planner, kind, assumed, ranks, gpus_per_node, network, host, sets)
    if sweep:
        _print_sweep(run, setting, numbers, note, f"{config.stem}: planned", png, as_json=as_json)
        return
    planned = plan_run(run, setting, note, Asked(size_px, mfu, peak_tflops, epoch_images))
    typer.echo(json.dumps(plan_json(planned), indent=1) if as_json else "\n".join(plan_lines(planned)))


def _print_sweep(
    run: RunConfig, setting: Setting, numbers: list[int], note: str, title: str, png: Path, *, as_json: bool
) -> None:
    from piip_scale.cli.plan_json import scaling_json
    from piip_scale.cli.scaling_plot import check_picture, plot_scaling
    from piip_scale.engine.layout_choice import layout_text
    from piip_scale.engine.planning.scaling import scaling, scaling_lines

    check_picture(png)
    precision = run.train.precision
    points = list(scaling(run, numbers, setting.ranks_per_node, lambda ranks: setting.chooser(precision, ranks)))
    where = f"{setting.gpu.name}, {setting.ranks_per_node} a node, {setting.network_gbps:g} Gb/s a node"
    if as_json:
        typer.echo(json.dumps(scaling_json(points), indent=1))
    else:
        stated = setting.stated(precision, points[-1].num_ranks)
        typer.echo("\n".join([*filter(None, [note]), *stated, *scaling_lines(run, points, layout_text)]))
    plot_scaling(points, f"{title}, {where}", png)
    typer.echo(f"drawn in {png}", err=as_json)
