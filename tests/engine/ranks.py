"""Real processes that talk over gloo, for tests."""

from __future__ import annotations

import queue
import socket
import traceback

import torch
import torch.multiprocessing

from piip_scale.config.loading import check_config
from piip_scale.config.run import RunConfig
from piip_scale.world import World

_BRANCH = {"kind": "vit", "embed_dim": 32, "depth": 2, "num_heads": 2}
FORCED_RELEASE = {"zero_optimization": {"stage3_max_live_parameters": 100000, "stage3_max_reuse_distance": 0}}


def tiny_config(**sections) -> RunConfig:
    """A run's config; the model section is never built, the tiny task ignores it."""
    values = {
        "model": {"branches": [_BRANCH | {"resolution_px": 32}], "interaction": {"num_stages": 2}},
        "detector": {"kind": "mask_rcnn"},
        "data": {"train_shards": "train", "val_shards": "val", "micro_batch_size": 2},
        "schedule": {"warmup_steps": 2},
        "train": {"steps": 6, "precision": "fp32"},
    }
    for section, keys in sections.items():
        values[section] = values.get(section, {}) | keys
    return check_config(values)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_ranks(num_ranks: int, function, *args, timeout_s: float = 240):
    """Runs ``function(world, device, *args)`` on every rank; returns what each returned, or raises a failure."""
    context = torch.multiprocessing.get_context("spawn")
    results, port = context.Queue(), free_port()
    processes = [
        context.Process(target=_rank_main, args=(results, rank, num_ranks, port, function, args), daemon=True)
        for rank in range(num_ranks)
    ]
    for process in processes:
        process.start()
    found = {}
    try:
        while len(found) < num_ranks:
            rank, value, failure = results.get(timeout=timeout_s)
            if failure:
                raise AssertionError(f"rank {rank} failed:\n{failure}")
            found[rank] = value
    except queue.Empty:
        raise AssertionError(f"ranks {sorted(set(range(num_ranks)) - set(found))} hang") from None
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [found[rank] for rank in range(num_ranks)]


def _rank_main(results, rank: int, num_ranks: int, port: int, function, args) -> None:
    from piip_scale.engine.setup import init_distributed

    try:
        torch.set_num_threads(1)
        world = World(rank, num_ranks, rank, num_ranks, "127.0.0.1", port, "torchrun" if num_ranks > 1 else "single")
        value = function(world, init_distributed(world), *args)
        # numpy, since tensors travel by shared memory that dies with this process.
        results.put((rank, value, None))
    except BaseException:  # noqa: BLE001 - the parent reports it
        results.put((rank, None, traceback.format_exc()))
    results.close()
    results.join_thread()
