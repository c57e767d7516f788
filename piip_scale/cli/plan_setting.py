"""Where ``piip-scale plan`` plans a run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from piip_scale.data.reading.opened import OpenedSets
    from piip_scale.engine.gpus import Gpu
    from piip_scale.engine.planning.choices import Chooser
    from piip_scale.engine.planning.cluster import Assumptions, Cluster
    from piip_scale.engine.planning.planner import Planner


@dataclass(frozen=True)
class Setting:
    """GPUs, nodes, and what lies between.

    Attributes:
        planner: Of the GPUs.
        gpu: Their kind.
        assumed: What its data sheet leaves open.
        num_ranks: GPUs.
        ranks_per_node: Of each node.
        network_gbps: Of a node.
        host_capacity: Bytes of a node's host memory, where it is known.
        sets: A run's sets, as far as they are open.
    """

    planner: Planner
    gpu: Gpu
    assumed: Assumptions
    num_ranks: int
    ranks_per_node: int
    network_gbps: float
    host_capacity: float | None
    sets: OpenedSets

    @property
    def host_of_rank(self) -> float:
        """A rank's share of its host's memory; infinite where that is not known."""
        return math.inf if self.host_capacity is None else self.host_capacity / self.ranks_per_node

    def cluster(self, precision: str, num_ranks: int | None = None) -> Cluster:
        """For a run in that precision, on other ranks where they are given."""
        from piip_scale.engine.planning.cluster import gpu_cluster

        ranks = num_ranks or self.num_ranks
        return gpu_cluster(self.gpu, ranks, self.ranks_per_node, self.network_gbps, precision, self.assumed)

    def chooser(self, precision: str, num_ranks: int | None = None) -> Chooser:
        """Likewise."""
        from piip_scale.engine.planning.choices import Chooser

        return Chooser(self.planner, self.cluster(precision, num_ranks), self.host_capacity or math.inf)

    def stated(self, precision: str, num_ranks: int | None = None) -> list[str]:
        """What times rest on here, as lines."""
        from piip_scale.engine.planning.time_lines import assumption_lines

        return assumption_lines(self.gpu, self.cluster(precision, num_ranks), self.network_gbps, self.assumed)
