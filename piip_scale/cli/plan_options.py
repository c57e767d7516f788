"""What ``piip-scale plan`` can be asked."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from piip_scale.errors import ConfigError

if TYPE_CHECKING:
    from piip_scale.engine.gpus import Gpu
    from piip_scale.engine.planning.cluster import Assumptions

# Infinite numbers are none that JSON knows.
_MOST = 1e6

Nodes = Annotated[int | None, typer.Option(min=1, help="Nodes; default: 1.")]
GpusOfNode = Annotated[int, typer.Option(min=1, help="GPUs of a node.")]
GpuKind = Annotated[str, typer.Option(help="Kind of GPU: h100, h200, a100-80, a100-40, b200, l40s, rtx4090 ...")]
NetworkGbps = Annotated[
    float | None, typer.Option(min=0.001, max=_MOST, help="Gb/s of a whole NODE to others; default: zero.network_gbps.")
]
Measured = Annotated[
    Path | None, typer.Option(metavar="FILE", help="gpu.jsonl of benchmarks/gpu.py, in the place of assumptions.")
]
GpuMemory = Annotated[float | None, typer.Option(min=1, max=_MOST, help="Memory of a GPU; default: what --gpu has.")]
HostMemory = Annotated[float | None, typer.Option(min=1, max=_MOST, help="Memory of a node's host, to be checked.")]
ImageSize = Annotated[str, typer.Option(metavar="HxW", help="Images in px; default: the largest in training.")]
Mfu = Annotated[float | None, typer.Option(min=0.01, max=1, help="Print the time at this MFU, as training logs it.")]
PeakTflops = Annotated[
    float | None, typer.Option(min=1, max=_MOST, help="What --mfu is a share of; default: what --gpu has.")
]
EpochImages = Annotated[
    int | None, typer.Option(min=1, help="Images of an epoch; default: those of the training set, where it is there.")
]
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
        ConfigError: No table knows that kind, or it is another than was recorded.
        DataError: The recording cannot be meant.
    """
    from piip_scale.engine.gpus import DEFAULT_GPU, gpu_named
    from piip_scale.engine.planning.cluster import Assumptions
    from piip_scale.engine.planning.measured import read_measured

    if measured is None:
        return gpu_named(name or DEFAULT_GPU), Assumptions()
    kind, assumed = read_measured(measured)
    if name and gpu_named(name).name != kind.name:
        raise ConfigError(
            f"--measured {measured}",
            value=kind.name,
            rule=f"a recording of the GPU that --gpu asks for, {name}",
            fix="leave one of them out",
        )
    return kind, assumed


def refuse_beside_sweep(**given: object) -> None:
    """Refuses what a sweep would not look at.

    Args:
        given: Values by the names of their options; ``None`` where one was not given.

    Raises:
        ConfigError: There are some.
    """
    for name, value in given.items():
        if value is not None:
            raise ConfigError(
                f"--{name.replace('_', '-')}",
                value=value,
                rule="--sweep says the numbers of nodes, and prints step times of each",
                fix="leave one of them out",
            )
