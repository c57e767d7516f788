"""Ranks as processes of this machine."""

from __future__ import annotations

import pickle
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing

from piip_scale.world import World


def run_ranks(num_ranks: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Runs ``function(world, device, *args)`` on every rank of a fresh world.

    Args:
        num_ranks: Processes.
        function: Importable; what it returns must pickle.
        args: Passed on.

    Returns:
        What each rank returned.

    Raises:
        torch.multiprocessing.ProcessRaisedException: A rank failed; the others are ended.
    """
    with socket.socket() as listener, tempfile.TemporaryDirectory() as folder:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        listener.close()
        torch.multiprocessing.spawn(_main, (num_ranks, port, folder, function, args), nprocs=num_ranks)  # type: ignore[attr-defined]
        return [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(num_ranks)]


def _main(rank: int, num_ranks: int, port: int, folder: str, function: Callable[..., Any], args: Any) -> None:
    from piip_scale.engine.setup import init_distributed

    # More threads than cores would time the scheduler.
    torch.set_num_threads(1)
    world = World(rank, num_ranks, rank, num_ranks, "127.0.0.1", port, "torchrun" if num_ranks > 1 else "single")
    value = function(world, init_distributed(world), *args)
    (Path(folder) / str(rank)).write_bytes(pickle.dumps(value))
    if num_ranks > 1:
        # Whoever leaves first would break the others' last collective.
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
