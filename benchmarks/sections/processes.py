"""Ranks as processes of this machine."""

from __future__ import annotations

import pickle
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing

from piip_scale.world import World, held_port


def run_ranks(num_ranks: int, function: Callable[..., Any], *args: Any, timeout_s: float = 1800) -> list[Any]:
    """Runs ``function(world, device, *args)`` on every rank of a fresh world.

    Args:
        num_ranks: Processes.
        function: Importable; what it returns must pickle.
        args: Passed on.
        timeout_s: The ranks are ended after so long.

    Returns:
        What each rank returned.

    Raises:
        torch.multiprocessing.ProcessRaisedException: A rank failed; the others are ended.
        TimeoutError: They hang.
    """
    with held_port() as port, tempfile.TemporaryDirectory() as folder:
        arguments = (num_ranks, port, folder, function, args)
        context = torch.multiprocessing.spawn(_main, arguments, nprocs=num_ranks, join=False, daemon=True)  # type: ignore[attr-defined]
        wait_for(context, timeout_s)
        return [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(num_ranks)]


def wait_for(context: Any, timeout_s: float) -> None:
    """Waits for the end of ranks; ends them, and raises TimeoutError, where they take longer."""
    deadline = time.monotonic() + timeout_s
    while not context.join(timeout=1):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            raise TimeoutError(f"{len(context.processes)} ranks did not end within {timeout_s:g} s")


def _main(rank: int, num_ranks: int, port: int, folder: str, function: Callable[..., Any], args: Any) -> None:
    from piip_scale.engine.zero.setup import init_distributed

    # More threads than cores would time the scheduler.
    torch.set_num_threads(1)
    world = World(rank, num_ranks, rank, num_ranks, "127.0.0.1", port, "torchrun" if num_ranks > 1 else "single")
    value = function(world, init_distributed(world), *args)
    (Path(folder) / str(rank)).write_bytes(pickle.dumps(value))
    if num_ranks > 1:
        # Whoever leaves first would break the others' last collective.
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
