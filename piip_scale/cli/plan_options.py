"""What ``piip-scale plan`` can be asked."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from piip_scale.engine.gpus import Gpu
    from piip_scale.engine.planning.cluster import Assumptions

Nodes = Annotated[int, typer.Option(min=1, help="Nodes.")]
GpusOfNode = Annotated[int, typer.Option(min=1, help="GPUs of a node.")]
GpuKind = Annotated[str, typer.Option(help="Kind of GPU: h100, h200, a100-80, a100-40, b200, l40s, rtx4090 ...")]
NetworkGbps = Annotated[
    float | None, typer.Option(min=0.001, help="Gb/s of a whole NODE to others; default: zero.network_gbps.")
]
Measured = Annotated[
    Path | None, typer.Option(metavar="FILE", help="gpu.jsonl of benchmarks/gpu.py, in the place of assumptions.")
]
GpuMemory = Annotated[float | None, typer.Option(min=1, help="Memory of a GPU; default: what --gpu has.")]
HostMemory = Annotated[float | None, typer.Option(min=1, help="Memory of a node's host, to be checked.")]
ImageSize = Annotated[str, typer.Option(metavar="HxW", help="Images in px; default: the largest in training.")]
Mfu = Annotated[float | None, typer.Option(min=0.01, max=1, help="Print the time at this MFU, as training logs it.")]
PeakTflops = Annotated[float, typer.Option(min=1, help="Peak of a GPU in the run's precision, for --mfu.")]
Sweep = Annotated[
    str, typer.Option(metavar="1,2,4,...", help="Numbers of nodes: print how the run scales, and draw it.")
]
Png = Annotated[Path, typer.Option(help="Where --sweep draws.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON with exact numbers.")]


def gpu_asked(name: str, measured: Path | None) -> tuple[Gpu, Assumptions]:
    """The kind of GPU, and what its data sheet leaves open.

    Args:
        name: ``--gpu``; empty where it was not given.
        measured: ``--measured``.

    Raises:
        ConfigError: No table knows that kind.
        DataError: The recording cannot be meant.
    """
    from piip_scale.engine.gpus import DEFAULT_GPU, gpu_named
    from piip_scale.engine.planning.cluster import Assumptions
    from piip_scale.engine.planning.measured import read_measured

    if measured is None:
        return gpu_named(name or DEFAULT_GPU), Assumptions()
    kind, assumed = read_measured(measured)
    return gpu_named(name) if name else kind, assumed
