"""Memory and time to build a model and load its pretrained weights: cut at once, and the naive way."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import cast

import psutil
import torch
import torch.distributed as dist

from piip_scale.checkpoint.dtypes import BFLOAT16
from piip_scale.checkpoint.safetensors_writer import Entry, SafetensorsWriter
from piip_scale.config.branches import BranchConfig
from piip_scale.config.detection import DetectionRun
from piip_scale.config.loading import load_config
from piip_scale.config.model import PiipConfig
from piip_scale.config.pyramid import PyramidConfig
from piip_scale.engine.start_weights import start_weights
from piip_scale.engine.zero.plan import measure, plan_sharding
from piip_scale.engine.zero.setup import give_weights
from piip_scale.models.official_keys import official_branch_name
from piip_scale.models.piip import PIIP
from piip_scale.tasks.detection.model import build_detection_model
from piip_scale.world import World
from sections.processes import run_ranks
from sections.record import table
from sections.subject import detector_config

H6B = Path(__file__).parents[2] / "configs" / "coco" / "mask_rcnn_h6b_1024_512.py"
_LARGE = {"embed_dim": 2048, "num_heads": 16, "resolution_px": 224, "layer_scale_init": 1.0}
_NUM_CLASSES = 80
_GIB = 2**30
_NEEDED_BYTES = {"two ranks": 10 * _GIB, "H6B": 15 * _GIB}
_LOOK_SECONDS = 0.005
_SENT_ELEMENTS = 2**28  # half a gibibyte


@dataclass(frozen=True)
class Start:
    """What a rank's start took.

    Attributes:
        peak_bytes: The most anonymous memory above what the process had with everything imported.
        kept_bytes: Of it at the end.
        seconds: Of each phase, by the clock.
        parameters: Elements of the model.
    """

    peak_bytes: int
    kept_bytes: int
    seconds: Mapping[str, float]
    parameters: int


def section() -> str:
    """A branch of 1.5 billion parameters on two ranks, one of half that both ways; and who reads what stays whole.

    Raises:
        MemoryError: The machine has less memory free than this takes.
    """
    _require(_NEEDED_BYTES["two ranks"])
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            _both_ranks(Path(folder), name, way, depth)
            for name, way, depth in (
                ("cut at once", start, 30),
                ("cut at once", start, 14),
                ("naive", start_naively, 14),
            )
        ]
        sent = run_ranks(2, read_or_send, _some_file(Path(folder)))
    each, one = (max(seconds) for seconds in zip(*sent, strict=True))
    return (
        "A detector on one branch of width 2048, on two ranks, from a bfloat16 safetensors file that is not in the "
        "page cache, into what ZeRO-3 keeps in bfloat16; before the optimiser's state. Naive is a whole float32 "
        "model on every rank, the file loaded into it, cast, then cut by DeepSpeed; it is measured at half the "
        "size, since two ranks of the larger one do not fit beside what else ran. Memory is a rank's anonymous "
        "memory above its imports, the larger of the two ranks'. Seconds are the clock's on a machine that others "
        "used too.\n\n"
        + table(["", "parameters, billions", "peak, GiB", "kept, GiB", "build, s", "weights, s", "cut, s"], rows)
        + f"\n\nWhat stays whole: {_SENT_ELEMENTS * 2 / _GIB:.1f} GiB read by each rank take {each:.1f} s, read by "
        f"one and sent to the other {one:.1f} s: each reads."
    )


def _both_ranks(folder: Path, name: str, way: Callable[..., Start], depth: int) -> list[str]:
    model = {"branches": [_LARGE | {"depth": depth}], "interaction": {"num_stages": 1}}
    config = _with_file(detector_config(model=model), [folder / "large.safetensors"])
    found = run_ranks(2, way, config, folder)
    largest = max(found, key=lambda run: run.peak_bytes)
    return [name, f"{largest.parameters / 1e9:.2f}", *_cells(largest)]


def section_6b() -> str:
    """PIIP-H6B with its detector on one rank.

    Raises:
        MemoryError: The machine has less memory free than its weights take.
    """
    _require(_NEEDED_BYTES["H6B"])
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / "internvit.safetensors", Path(folder) / "mae.safetensors"]
        (found,) = run_ranks(1, start, _with_file(cast(DetectionRun, load_config(H6B)), files), Path(folder))
    head = ["", "parameters, billions", "peak, GiB", "kept, GiB", "build, s", "weights, s"]
    cells = _cells(found)[:4]
    return (
        "`mask_rcnn_h6b_1024_512` on one rank, from made-up bfloat16 files of InternViT-6B and MAE ViT-H that are not "
        "in the page cache, into what ZeRO-3 keeps in bfloat16; without the optimiser's state, which would "
        "not fit. The network is built on the meta device, both branches are read parameter by parameter, and the rest "
        "is drawn module by module.\n\n" + table(head, [["H6B", f"{found.parameters / 1e9:.2f}", *cells]])
    )


def start(world: World, device: torch.device, config: DetectionRun, folder: Path) -> Start:
    """Builds and loads as the engine does, up to where the optimiser comes."""
    _import_everything(folder)
    with _Watch() as watch:
        model = build_detection_model(config, _NUM_CLASSES, "meta")
        watch.end_phase("build")
        sizes = measure(model, model.parts())
        model.set_precision(torch.bfloat16)
        give_weights(model, config, sizes, plan_sharding(config, sizes, world.num_ranks), device)
        watch.end_phase("weights")
    return Start(watch.peak_bytes, watch.now_bytes, watch.seconds, sizes.numel)


def start_naively(world: World, _device: torch.device, config: DetectionRun, folder: Path) -> Start:
    """Builds all of it in float32, loads, casts, and has DeepSpeed cut it."""
    from deepspeed import zero

    _import_everything(folder)
    with _Watch() as watch:
        model = build_detection_model(config, _NUM_CLASSES)
        watch.end_phase("build")
        sizes = measure(model, model.parts())
        plan = plan_sharding(config, sizes, world.num_ranks)
        model.load_state_dict(start_weights(model, config).tensors, strict=False)
        model.bfloat16()
        watch.end_phase("weights")
        zero.Init(module=model, config_dict_or_path=plan.deepspeed)
        watch.end_phase("cut")
    return Start(watch.peak_bytes, watch.now_bytes, watch.seconds, sizes.numel)


def read_or_send(world: World, _device: torch.device, path: Path) -> tuple[float, float]:
    """Seconds for every rank to read a tensor from the page cache, and for one to read and send it."""
    from safetensors.torch import load_file

    source = load_file(path)["tensor"]
    source.sum()
    dist.barrier()
    began = time.perf_counter()
    whole = source.clone()
    each = time.perf_counter() - began
    dist.barrier()
    began = time.perf_counter()
    whole = source.clone() if world.is_main else torch.empty_like(whole)
    dist.broadcast(whole.view(torch.uint8), 0)
    return each, time.perf_counter() - began


class _Watch:
    """Anonymous memory of this process above what it had at first, and the seconds of phases."""

    def __enter__(self) -> _Watch:
        self.peak_bytes, self.seconds = 0, dict[str, float]()
        self._first, self._last, self._over = _anonymous_bytes(), time.perf_counter(), False
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over = True
        self._thread.join()
        self.now_bytes = _anonymous_bytes() - self._first

    def end_phase(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name], self._last = now - self._last, now

    def _look(self) -> None:
        while not self._over:
            self.peak_bytes = max(self.peak_bytes, _anonymous_bytes() - self._first)
            time.sleep(_LOOK_SECONDS)


def _anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def _import_everything(folder: Path) -> None:
    """Both ways once in small: what is imported on the way is no part of a model's memory."""
    small = detector_config()
    model = build_detection_model(small, _NUM_CLASSES, "meta")
    sizes = measure(model, model.parts())
    give_weights(model, small, sizes, plan_sharding(small, sizes, 1), torch.device("cpu"))
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _with_file(config: DetectionRun, paths: list[Path]) -> DetectionRun:
    """The config with made-up weights for each branch, written to these files."""
    branches = []
    for branch, path in zip(config.model.branches, paths, strict=True):
        _write_weights(branch, path)
        branches.append(branch.model_copy(update={"pretrained": str(path)}))
    model = config.model.model_copy(update={"branches": tuple(branches)})
    return config.model_copy(update={"model": model})


def _write_weights(config: BranchConfig, path: Path) -> None:
    kind = "internvit" if getattr(config, "position_class_slot", False) else "deit"
    one_stage = config.model_copy(update={"blocks_per_stage": ()})
    alone = PiipConfig(branches=(one_stage,), pyramid=PyramidConfig(scales=(1.0,)))
    with torch.device("meta"):
        state = PIIP(alone).branches[0].state_dict()
    names = {official_branch_name(name, config, kind): tensor.shape for name, tensor in state.items()}
    entries = [Entry(name, tuple(shape), BFLOAT16) for name, shape in names.items()]
    noise = torch.randn(max(shape.numel() for shape in names.values())).mul_(0.02).bfloat16()
    with SafetensorsWriter(path, entries, {"format": "pt"}) as writer:
        for entry in entries:
            _write(writer, entry, noise[: torch.Size(entry.shape).numel()])


def _some_file(folder: Path) -> Path:
    path = folder / "whole.safetensors"
    entry = Entry("tensor", (_SENT_ELEMENTS,), BFLOAT16)
    with SafetensorsWriter(path, [entry], {"format": "pt"}) as writer:
        _write(writer, entry, torch.zeros(_SENT_ELEMENTS, dtype=torch.bfloat16))
    return path


def _write(writer: SafetensorsWriter, entry: Entry, values: torch.Tensor) -> None:
    writer.write(entry.name, 0, values.view(torch.uint8).numpy().data)


def _cells(run: Start) -> list[str]:
    memory = [f"{size / _GIB:.2f}" for size in (run.peak_bytes, run.kept_bytes)]
    return memory + [f"{run.seconds[name]:.1f}" if name in run.seconds else "" for name in ("build", "weights", "cut")]


def _require(num_bytes: int) -> None:
    free = psutil.virtual_memory().available
    if free < num_bytes:
        raise MemoryError(f"{free / _GIB:.1f} GiB free, {num_bytes / _GIB:.0f} are needed")
