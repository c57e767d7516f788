"""Replicas under ZeRO-3: groups of ranks that share one copy of the state, and what the copies tell each other.

Groups follow each other in ranks: of eight ranks in groups of four, ranks 0 to 3 hold the first copy, and rank r of
each group the same slices. Inside a group all is as it is on so many ranks alone; between groups travel the sums of a
step's gradients, slice by slice, and nothing else. DeepSpeed 0.19.8 has no MiCS any more, which did this; but it takes
the group of data-parallel ranks from an ``mpu``, in Megatron's manner, which is what `Replicas` is to it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from piip_scale.engine.zero.deepspeed_api import Engine
from piip_scale.engine.zero.message_clock import MESSAGES
from piip_scale.engine.zero.partitions import frozen_parts, partitions
from piip_scale.errors import RunError

IN_FLIGHT = 8
"""Messages under way between replicas: enough to keep a network busy, and each a bucket's slices of memory."""


class Replicas:
    """This rank's place among groups of ranks, and the process groups of it. Making one is collective.

    Args:
        device: Ranks' kind of device decides how they talk.
        size: Ranks of a group; divides all.

    Attributes:
        shard: Process group of the ranks that share this one's copy.
        across: Process group of the ranks that hold the same slices as this one.
        shard_rank: This rank's place in ``shard``.
        replica: Which copy it holds a part of.
        num_ranks: Of ``shard``.
        num_replicas: Of ``across``.
    """

    def __init__(self, device: torch.device, size: int) -> None:
        self.num_ranks, self.num_replicas = size, dist.get_world_size() // size
        mesh = init_device_mesh(device.type, (self.num_replicas, size), mesh_dim_names=("replica", "shard"))
        self.shard, self.across = mesh.get_group("shard"), mesh.get_group("replica")
        self.replica, self.shard_rank = divmod(dist.get_rank(), size)

    @property
    def saves(self) -> bool:
        """Whether this rank writes its slices into checkpoints: one of those that hold them, in turns over replicas."""
        return self.shard_rank % self.num_replicas == self.replica

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """For DeepSpeed: among which all is cut."""
        return self.shard

    def get_data_parallel_world_size(self) -> int:
        """For DeepSpeed."""
        return self.num_ranks

    def get_data_parallel_rank(self) -> int:
        """For DeepSpeed."""
        return self.shard_rank

    def get_model_parallel_group(self) -> None:
        """For DeepSpeed: no model is cut in any other way."""

    def get_model_parallel_world_size(self) -> int:
        """For DeepSpeed."""
        return 1

    def get_model_parallel_rank(self) -> int:
        """For DeepSpeed."""
        return 0


def replicas_of(engine: Engine) -> Replicas | None:
    """Those that an engine was built with; ``None`` where all ranks share one copy."""
    found: Replicas | None = engine.mpu
    return found


def saves_slices(engine: Engine) -> bool:
    """Whether this rank writes what it holds into checkpoints: each slice is written once."""
    replicas = replicas_of(engine)
    return replicas is None or replicas.saves


def num_savers(engine: Engine) -> int:
    """Ranks that do."""
    replicas = replicas_of(engine)
    return dist.get_world_size() if replicas is None else replicas.num_ranks


def slices_rank(engine: Engine) -> int:
    """Whose slices this rank holds, as files of a checkpoint are numbered."""
    replicas = replicas_of(engine)
    return dist.get_rank() if replicas is None else replicas.shard_rank


def check_replicas(engine: Engine) -> None:
    """Holds replicas to begin with the same weights: nothing would make them equal again. Collective.

    Each rank reads what it holds, from files that may differ from node to node.

    Raises:
        RunError: They have not, on every rank of a group that differs.
    """
    replicas = replicas_of(engine)
    if replicas is None:
        return
    held = [part.of(each.master.detach().view(-1)) for each in partitions(engine) for part in each.slices]
    held += [part.of(data) for part, data in frozen_parts(engine)]
    total = torch.stack([each.view(torch.uint8).sum(dtype=torch.int64) for each in held]).sum()
    own = torch.stack([total, -total])
    least = own.clone()
    dist.all_reduce(least, dist.ReduceOp.MIN, group=replicas.across)
    if not torch.equal(least, own):
        raise RunError(
            f"replica {replicas.replica} of the model does not begin with the weights of the others",
            rule="every node reads the same files of weights",
            fix="give every node the same files, then start again",
        )


class SumsAcross:
    """Sums slices over replicas, while the backward pass goes on. Collective.

    Every rank of a group gets the same bits: each element is added up in one place and sent from there.

    Args:
        replicas: This rank's.
        dtype: Of messages; sums are rounded to it.
    """

    def __init__(self, replicas: Replicas, dtype: torch.dtype) -> None:
        self._group, self._dtype = replicas.across, dtype
        self._flying: deque[tuple[Any, Tensor, Sequence[Tensor]]] = deque()

    def begin(self, sums: Sequence[Tensor]) -> None:
        """Sends slices, float32, whose sums over this rank's group are whole; they change when they land."""
        while len(self._flying) >= IN_FLIGHT:
            self._land()
        message = torch.empty(sum(each.numel() for each in sums), dtype=self._dtype, device=sums[0].device)
        torch._foreach_copy_(_parts(message, sums), list(sums))
        work = dist.all_reduce(message, group=self._group, async_op=True)
        self._flying.append((work, message, sums))

    def finish(self) -> None:
        """All slices that were sent are whole sums, to whatever the device is told next in this stream."""
        while self._flying:
            self._land()

    def _land(self) -> None:
        work, message, sums = self._flying.popleft()
        with MESSAGES.still(message.device):
            work.wait()
        torch._foreach_copy_(list(sums), _parts(message, sums))


def _parts(message: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    split = message.split([each.numel() for each in like])
    return [part.view(each.shape) for part, each in zip(split, like, strict=True)]
