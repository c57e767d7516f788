"""Ranks on nodes that this machine plays: each node a network of its own, with a rate to the others."""

from __future__ import annotations

import ctypes
import os
import pickle
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing

from piip_scale.world import World
from sections.processes import wait_for

_NEW_NETWORK = 0x40000000
_PORT = 29511
_LINK, _MEGA = "to_others", 10**6
# A queue that holds a quarter of a second: less drops what gloo sends at once, and TCP is slow to recover.
_BURST, _QUEUE = "64kb", "250ms"


def run_nodes(num_nodes: int, ranks_per_node: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Runs ``function(world, device, *args)`` on every rank, as ``processes.run_ranks``; needs root, ip and tc.

    Nodes are network namespaces at one bridge; ranks of a node talk over its loopback.

    Args:
        num_nodes: Nodes.
        ranks_per_node: Of each.
        function: Importable; what it returns must pickle.
        args: Passed on.

    Returns:
        What each rank returned.

    Raises:
        subprocess.CalledProcessError: This machine lets no networks be made.
    """
    num_ranks = num_nodes * ranks_per_node
    with _networks(num_nodes) as names, tempfile.TemporaryDirectory() as folder:
        main = partial(_main, names, ranks_per_node, folder, function)
        context = torch.multiprocessing.spawn(main, args, nprocs=num_ranks, join=False, daemon=True)  # type: ignore[attr-defined]
        wait_for(context, timeout_s=1800)
        return [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(num_ranks)]


def limit_rate(world: World, megabits_per_s: float) -> None:
    """From now on this rank's node sends no faster to others; only the first rank of each node sets it."""
    if world.local_rank == 0:
        limit = f"tc qdisc replace dev {_LINK} root tbf rate {megabits_per_s}mbit burst {_BURST} latency {_QUEUE}"
        subprocess.run(limit.split(), check=True)


def bytes_to_others() -> int:
    """That this rank's node has sent to other nodes so far, headers included."""
    for line in Path("/proc/self/net/dev").read_text(encoding="utf-8").splitlines():
        name, _, numbers = line.strip().partition(":")
        if name == _LINK:
            return int(numbers.split()[8])
    raise LookupError(f"no {_LINK} among the links of this process")


@contextmanager
def _networks(num_nodes: int) -> Iterator[list[str]]:
    prefix = f"piip{os.getpid()}"
    names = [f"{prefix}n{node}" for node in range(num_nodes)]
    switch = f"{prefix}s"
    try:
        _ip(f"netns add {switch}", f"-n {switch} link add bridge type bridge", f"-n {switch} link set bridge up")
        for node, name in enumerate(names):
            _ip(
                f"netns add {name}",
                f"link add {_LINK} netns {name} type veth peer name port{node} netns {switch}",
                f"-n {switch} link set port{node} master bridge up",
                f"-n {name} address add {_address(node)}/24 dev {_LINK}",
                f"-n {name} link set {_LINK} up",
                f"-n {name} link set lo up",
            )
        yield names
    finally:
        for name in [*names, switch]:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def _ip(*commands: str) -> None:
    for command in commands:
        subprocess.run(["ip", *command.split()], check=True)


def _address(node: int) -> str:
    return f"10.77.0.{node + 1}"


def _main(
    names: list[str], ranks_per_node: int, folder: str, function: Callable[..., Any], rank: int, *args: Any
) -> None:
    node, local_rank = divmod(rank, ranks_per_node)
    _enter(names[node])
    os.environ["GLOO_SOCKET_IFNAME"] = _LINK
    from piip_scale.engine.zero.setup import init_distributed

    torch.set_num_threads(1)
    num_ranks = len(names) * ranks_per_node
    world = World(rank, num_ranks, local_rank, ranks_per_node, _address(0), _PORT, "torchrun", node)
    value = function(world, init_distributed(world), *args)
    (Path(folder) / str(rank)).write_bytes(pickle.dumps(value))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _enter(name: str) -> None:
    """Moves this process, which has one thread so far, into a network."""
    with Path("/run/netns", name).open() as network:
        if ctypes.CDLL(None, use_errno=True).setns(network.fileno(), _NEW_NETWORK):
            raise OSError(ctypes.get_errno(), f"cannot enter network {name}")
