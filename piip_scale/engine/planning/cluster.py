"""What a plan's time is reckoned with: rates of a rank, of links and of hosts, and how messages travel."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from piip_scale.engine.gpus import Gpu
from piip_scale.engine.zero.traffic import PASSES, Kind

_GIGA, _TERA = 1e9, 1e12
_BITS = 8
# Of a packet of 1,514 bytes TCP carries 1,448; gloo reaches that (benchmarks/layouts.md).
_TCP_SHARE = 1448 / 1514
H6B_OPERATORS = 16_540
"""That the network of ``configs/coco/mask_rcnn_h6b_1024_512.py`` calls in a micro-batch, blocks computed again."""


@dataclass(frozen=True)
class Link:
    """A link in one direction.

    Attributes:
        bytes_per_s: That it carries.
        latency_s: Of one hop.
    """

    bytes_per_s: float
    latency_s: float = 0.0


@dataclass(frozen=True)
class Transport:
    """How a communication library sends.

    Attributes:
        name: Its name.
        passes: Times that all but one rank's part of a message goes round the ring, by kind.
        hides: Whether messages of a kind go on while the rank computes.
        copies: Whether it sums a copy of what ranks hand over, where a result has another place.
    """

    name: str
    passes: Mapping[Kind, int]
    hides: Mapping[Kind, bool]
    copies: bool = False


NCCL = Transport("nccl", PASSES, {"all-gather": True, "reduce-scatter": True, "all-reduce": True})
GLOO = Transport(
    # torch's reduce-scatter over gloo is an all-reduce, and the engine waits for it where a device has no streams.
    "gloo",
    {"all-gather": 1, "reduce-scatter": 2, "all-reduce": 2},
    {"all-gather": True, "reduce-scatter": False, "all-reduce": True},
    copies=True,
)


@dataclass(frozen=True)
class Cluster:
    """Ranks, nodes, and their rates.

    Attributes:
        num_ranks: All.
        ranks_per_node: Of each node.
        flops: FLOP/s of one rank in products, in the precision of the run.
        fp32_flops: The same in float32, as neck and heads compute.
        inner: Of one rank to the others of its node.
        outer: Of one whole node to others.
        memory_bytes_per_s: Of a rank's device.
        pcie: Between a rank's device and its host.
        host_bytes_per_s: Of a node's host memory; an update of what is offloaded is bound by it.
        operator_s: That the host needs for an operator of the network, all that surrounds it included.
        message_s: That the host needs for a message, however long: hooks, waking the other ranks.
        socket_bytes_per_s: Of messages that a rank's own core passes on, as sockets have it do, while it can do nothing
            else; infinite where links do that.
        asynchronous: Whether the device computes while the host goes on, as GPUs do; else the host's time comes on top.
        transport: Of messages.
        peak_flops: What MFU is a share of; 0 where that is not known.
    """

    num_ranks: int
    ranks_per_node: int
    flops: float
    fp32_flops: float
    inner: Link
    outer: Link
    memory_bytes_per_s: float = math.inf
    pcie: Link = Link(math.inf)
    host_bytes_per_s: float = math.inf
    operator_s: float = 0.0
    message_s: float = 0.0
    socket_bytes_per_s: float = math.inf
    asynchronous: bool = True
    transport: Transport = NCCL
    peak_flops: float = 0.0


@dataclass(frozen=True)
class Assumptions:
    """What no data sheet says. Each is replaced by a measurement where there is one.

    Attributes:
        product_share: Of the peak that products reach, those of branches and interactions.
        memory_share: Of the memory's rate that is reached between them.
        link_share: Of NVLink, PCIe and network that messages reach.
        inner_latency_s: Of a hop inside a node.
        outer_latency_s: Of a hop between nodes.
        operator_s: See ``Cluster``. Measured on two busy CPU cores (benchmarks/step.md): 439 ms of a micro-batch of
            PIIP-H6B, forward and backward.
        host_gb_s: GB/s of a node's host memory.
        measured: What of these, and of the GPU's row, is measured.
    """

    product_share: float = 0.65
    memory_share: float = 0.8
    link_share: float = 0.8
    inner_latency_s: float = 3e-6
    outer_latency_s: float = 1e-5
    operator_s: float = 0.439 / H6B_OPERATORS
    host_gb_s: float = 200.0
    measured: Mapping[str, str] = field(default_factory=dict)


def gpu_cluster(
    gpu: Gpu,
    num_ranks: int,
    ranks_per_node: int,
    network_gbps: float,
    precision: str = "bf16",
    assumed: Assumptions | None = None,
) -> Cluster:
    """The cluster of so many GPUs of a kind.

    Args:
        gpu: The kind.
        num_ranks: GPUs.
        ranks_per_node: GPUs of a node.
        network_gbps: Gb/s of a whole node to others, in one direction.
        precision: Of the run.
        assumed: What the data sheet leaves open.
    """
    assumed = assumed or Assumptions()
    peak = (gpu.bf16_tflops if precision == "bf16" else gpu.tf32_tflops) * _TERA
    return Cluster(
        num_ranks=num_ranks,
        ranks_per_node=ranks_per_node,
        flops=assumed.product_share * peak,
        fp32_flops=assumed.product_share * gpu.tf32_tflops * _TERA,
        inner=Link(assumed.link_share * gpu.link_gb_s * _GIGA, assumed.inner_latency_s),
        outer=Link(assumed.link_share * network_gbps * _GIGA / _BITS, assumed.outer_latency_s),
        memory_bytes_per_s=assumed.memory_share * gpu.memory_gb_s * _GIGA,
        pcie=Link(assumed.link_share * gpu.pcie_gb_s * _GIGA),
        host_bytes_per_s=assumed.host_gb_s * _GIGA,
        operator_s=assumed.operator_s,
        peak_flops=peak,
    )


def cpu_cluster(num_ranks: int, ranks_per_node: int, network_gbps: float, ranks_per_core: float = 1.0) -> Cluster:
    """The same of ranks that compute on CPU cores and talk over gloo: orders of magnitude, to choose a layout by.

    A core is taken for 100 GFLOP/s and 20 GB/s of memory, also to the other ranks of its host, and for 13 us an
    operator; a message costs it 1.7 ms and a byte of it 2.3 ns: what benchmarks/layouts.md found. All of a network's
    rate is reached, headers included.

    Args:
        num_ranks: All.
        ranks_per_node: Of each node.
        network_gbps: Gb/s of a whole node to others, in one direction.
        ranks_per_core: That share one, each of which takes as many times longer; at least 1.
    """
    speed = 1 / ranks_per_core
    return Cluster(
        num_ranks=num_ranks,
        ranks_per_node=ranks_per_node,
        flops=100 * _GIGA * speed,
        fp32_flops=100 * _GIGA * speed,
        inner=Link(20 * _GIGA * speed, 5e-5),
        outer=Link(_TCP_SHARE * network_gbps * _GIGA / _BITS, 1e-4),
        memory_bytes_per_s=20 * _GIGA * speed,
        host_bytes_per_s=20 * _GIGA * ranks_per_node * speed,
        operator_s=1.3e-5 / speed,
        message_s=1.7e-3 / speed,
        socket_bytes_per_s=0.43 * _GIGA * speed,
        asynchronous=False,
        transport=GLOO,
    )
