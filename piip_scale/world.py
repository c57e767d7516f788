"""Who this process is among all: the only reader of RANK, SLURM_* and their like."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from piip_scale.errors import WorldError


@dataclass(frozen=True)
class World:
    """Ranks and nodes of one training, as seen by one process.

    Attributes:
        rank: Index of this process among all, 0-based.
        num_ranks: Processes in all.
        local_rank: Index of this process on its node.
        ranks_per_node: Processes on this node.
        master_address: Host of rank 0.
        master_port: Port at which the ranks meet.
        launcher: Who started the process: ``single``, ``torchrun`` or ``slurm``.
    """

    rank: int = 0
    num_ranks: int = 1
    local_rank: int = 0
    ranks_per_node: int = 1
    master_address: str = "127.0.0.1"
    master_port: int = 29500
    launcher: str = "single"

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.num_ranks:
            raise WorldError("rank out of range", value=self.rank, rule=f"0 <= rank < {self.num_ranks}")
        if not 0 <= self.local_rank < self.ranks_per_node <= self.num_ranks:
            raise WorldError(
                "local rank out of range",
                value=self.local_rank,
                rule=f"0 <= local rank < {self.ranks_per_node} ranks per node <= {self.num_ranks} ranks",
            )

    @property
    def node_rank(self) -> int:
        """Index of this process's node."""
        return self.rank // self.ranks_per_node

    @property
    def is_main(self) -> bool:
        """True on rank 0, which writes what only one rank may write."""
        return self.rank == 0

    def as_environment(self) -> dict[str, str]:
        """The variables torch.distributed's ``env://`` rendezvous and DeepSpeed read."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.num_ranks),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.ranks_per_node),
            "MASTER_ADDR": self.master_address,
            "MASTER_PORT": str(self.master_port),
        }


def read_world(environment: Mapping[str, str] | None = None) -> World:
    """Reads the world from torchrun's or Slurm's variables; alone where neither is set.

    Args:
        environment: Variables to read instead of the process's own.

    Raises:
        WorldError: A variable is missing beside its siblings, or is not a number.
    """
    env = os.environ if environment is None else environment
    if "RANK" in env:
        return World(
            rank=_integer(env, "RANK"),
            num_ranks=_integer(env, "WORLD_SIZE"),
            local_rank=_integer(env, "LOCAL_RANK"),
            ranks_per_node=_integer(env, "LOCAL_WORLD_SIZE"),
            master_address=_text(env, "MASTER_ADDR"),
            master_port=_integer(env, "MASTER_PORT"),
            launcher="torchrun",
        )
    # Inside an sbatch script, outside srun, SLURM_PROCID is 0 as well; SLURM_STEP_ID tells srun's tasks.
    if "SLURM_STEP_ID" in env and "SLURM_PROCID" in env:
        return World(
            rank=_integer(env, "SLURM_PROCID"),
            num_ranks=_integer(env, "SLURM_STEP_NUM_TASKS"),
            local_rank=_integer(env, "SLURM_LOCALID"),
            ranks_per_node=_integer(env, "SLURM_NTASKS_PER_NODE"),
            master_address=_text(env, "MASTER_ADDR"),
            master_port=_integer(env, "MASTER_PORT"),
            launcher="slurm",
        )
    return World()


def _text(env: Mapping[str, str], name: str) -> str:
    if name not in env:
        raise WorldError(
            f"environment variable {name} is not set",
            rule="torchrun and launch/train.sbatch set it together with the rank",
            fix="start with one of them, or unset RANK / leave srun for a single process",
        )
    return env[name]


def _integer(env: Mapping[str, str], name: str) -> int:
    text = _text(env, name)
    try:
        return int(text)
    except ValueError:
        raise WorldError(f"environment variable {name}", value=text, rule="it must be a whole number") from None
