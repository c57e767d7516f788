"""A node's look at itself before a training starts on it: one process a node, seconds."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from piip_scale import __version__
from piip_scale.errors import PiipError, RunError
from piip_scale.files import available_memory_bytes, named_folder
from piip_scale.launch.compile_caches import use_local_cache
from piip_scale.launch.node_facts import GpuFacts, NodeFacts, Reduction, save_facts
from piip_scale.run.reasons import reason_of
from piip_scale.world import World, node_name, read_world

if TYPE_CHECKING:
    import torch


_CPU_BYTES, _GPU_BYTES = 8 << 20, 256 << 20
_ROUNDS = 3
_DRIVER = Path("/proc/driver/nvidia/version")
_CACHE_VARIABLES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TORCH_EXTENSIONS_DIR")


def check_node(folder: Path, config: Path | None, overrides: Sequence[str], gpus: int, bound_s: float) -> None:
    """Writes this node's facts into a folder, and again with the sum over all nodes. Collective, one process a node.

    Args:
        folder: Where the supervisor looks.
        config: The run's config, whose shards are looked at.
        overrides: Changes to it.
        gpus: GPUs that the training uses here; 0 leaves GPUs alone.
        bound_s: The process ends by itself after that time.

    Raises:
        OSError: The folder cannot be written.
    """
    # A collective that hangs does not end by itself.
    bound = threading.Timer(bound_s, os._exit, (1,))
    bound.daemon = True
    bound.start()
    try:
        facts = _look(config, overrides, gpus)
        save_facts(folder, facts)
        reduction = reduce_among_nodes(read_world(), gpus > 0, bound_s / 2)
        if reduction:
            save_facts(folder, replace(facts, reduction=reduction))
    finally:
        bound.cancel()


def _look(config: Path | None, overrides: Sequence[str], gpus: int) -> NodeFacts:
    data_error = _try_data(config, overrides) if config else None
    disks, errors = _look_at_disks()
    # Also where none were asked for: a node that is given whole comes with its own.
    found = tuple(_look_at_gpus())
    return NodeFacts(
        node=node_name(),
        versions=_versions(gpus > 0 or bool(found)) | {"gpus": str(len(found))},
        gpus=found,
        free_disk_bytes=disks,
        disk_errors=tuple(errors),
        memory_bytes=available_memory_bytes(),
        data_error=data_error.line if data_error else "",
        data_reason=reason_of(data_error) if data_error else "",
        # Last: it is compared with the time at which the answer arrives.
        unix_time_s=time.time(),
    )


def _try_data(config: Path, overrides: Sequence[str]) -> PiipError | None:
    from piip_scale.config import load_config
    from piip_scale.data.reading.opened import OpenedSets
    from piip_scale.models.pretrained import check_pretrained
    from piip_scale.tasks.classes import with_classes

    try:
        run = load_config(config, overrides)
        with_classes(run, OpenedSets())
        check_pretrained(run.model)
    except PiipError as error:
        return error
    return None


def _look_at_disks() -> tuple[dict[str, int], list[str]]:
    free, errors = {}, []
    try:
        use_local_cache()
    except RunError as error:
        errors.append(error.line)
    named = {os.environ[name]: name for name in _CACHE_VARIABLES if os.environ.get(name)}
    for folder in dict.fromkeys([tempfile.gettempdir(), *named]):
        try:
            if folder in named:
                named_folder(Path(folder), RunError, fix=f"set {named[folder]} to a folder of your own")
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(b"x")
            free[folder] = shutil.disk_usage(folder).free
        except RunError as error:
            errors.append(error.line)
        except OSError as error:
            errors.append(f"{folder} cannot be written: {error.strerror}")
    return free, errors


def _versions(with_gpus: bool) -> dict[str, str]:
    import torch

    versions = {"torch": torch.__version__, "python": platform.python_version(), "package": __version__}
    if with_gpus:
        with suppress(OSError):
            versions["driver"] = _DRIVER.read_text(encoding="utf-8").splitlines()[0].split("  ")[1]
        with suppress(RuntimeError, AttributeError):
            versions["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    return versions


def _look_at_gpus() -> list[GpuFacts]:
    import torch

    return [_look_at_gpu(index) for index in range(torch.cuda.device_count())]


def _look_at_gpu(index: int) -> GpuFacts:
    import torch

    name = torch.cuda.get_device_name(index)
    try:
        free, total = torch.cuda.mem_get_info(index)
        ones = torch.ones(1024, 1024, device=f"cuda:{index}")
        wrong = int(((ones @ ones) != 1024).sum())
    except RuntimeError as error:
        return GpuFacts(name, 0, 0, " ".join(str(error).split())[:200])
    return GpuFacts(name, free, total, f"{wrong} wrong products of 1048576" if wrong else "")


def reduce_among_nodes(world: World, on_gpu: bool, limit_s: float) -> Reduction | None:
    """Sums a tensor over the nodes, whose result is known; ``None`` where there is one. Collective.

    Args:
        world: One rank a node.
        on_gpu: With NCCL, from the first GPU of each; with gloo otherwise.
        limit_s: How long joining and each sum may take.
    """
    if world.num_ranks == 1:
        return None
    import torch
    import torch.distributed as dist

    try:
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            init_method=f"tcp://{world.master_address}:{world.master_port}",
            rank=world.rank,
            world_size=world.num_ranks,
            timeout=timedelta(seconds=limit_s),
        )
        device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
        return _timed_sum(world, device, _GPU_BYTES if on_gpu else _CPU_BYTES)
    except RuntimeError as error:  # DistError too
        return Reduction(error=" ".join(str(error).split())[:200])


def _timed_sum(world: World, device: torch.device, num_bytes: int) -> Reduction:
    import torch
    import torch.distributed as dist

    expected = world.num_ranks * (world.num_ranks + 1) // 2
    values, seconds = torch.empty(num_bytes // 4, device=device), []
    for _ in range(_ROUNDS):
        values.fill_(world.rank + 1)
        dist.barrier()
        started = time.perf_counter()
        dist.all_reduce(values)
        wrong = int((values != expected).sum())  # waits for the device
        seconds.append(time.perf_counter() - started)
        if wrong:
            return Reduction(error=f"{wrong} of {values.numel()} sums are wrong")
    share = 2 * (world.num_ranks - 1) / world.num_ranks
    return Reduction(gib_s=share * num_bytes / min(seconds) / 2**30)
