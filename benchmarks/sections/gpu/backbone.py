"""Networks forward and backward without an optimiser: what the arithmetic reaches before anything is sharded."""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from piip_scale.config.detection import DetectionRun
from piip_scale.config.loading import load_config
from piip_scale.engine.compiling import BACKEND, compile_blocks
from piip_scale.engine.rehearsal import rehearse
from piip_scale.models.piip import PIIP
from piip_scale.tasks.heads import network_parts
from sections.gpu.jobs import Job, Setting, Values
from sections.gpu.timing import GIB, peak_gib, reset_peak, synchronize
from sections.gpu.work import network_tflop, peak_share
from sections.subject import SIZE_PX, detector_config

CONFIGS = Path(__file__).parents[3] / "configs" / "coco"
_NUM_KERNELS = 20


@dataclass(frozen=True)
class Network:
    """A published network and the image it is timed on."""

    name: str
    config: str
    height_px: int
    width_px: int


H6B = Network("H6B 1024/512", "mask_rcnn_h6b_1024_512.py", 1024, 1024)
TSB = Network("TSB 1568/896/448", "mask_rcnn_deit_tsb_1568_896_448.py", 1568, 1568)
SBL = Network("SBL 1568/1120/672", "mask_rcnn_deit_sbl_1568_1120_672.py", 1568, 1568)


@dataclass(frozen=True)
class Variant:
    """How a network is run.

    Attributes:
        images: Of a micro-batch.
        checkpoint: Whether blocks are computed anew in the backward pass.
        compiled: Whether blocks are compiled.
    """

    images: int
    checkpoint: bool
    compiled: bool = False

    def __str__(self) -> str:
        words = [f"{self.images} image{'s' * (self.images > 1)}", "checkpointed" if self.checkpoint else "kept"]
        return ", ".join(words + ["compiled"] * self.compiled)


def jobs(setting: Setting) -> list[Job]:
    """The most telling first: one image of the largest network as the recipe runs it, and its kernels."""
    variants = [Variant(images, checkpoint) for images in (1, 2, 4) for checkpoint in (True, False)]
    variants += [Variant(1, False, compiled=True), Variant(2, False, compiled=True)]
    networks = (H6B, TSB, SBL)
    first = [(H6B, variants[0]), (H6B, variants[1]), (TSB, variants[1]), (H6B, variants[2]), (SBL, variants[1])]
    rest = [(network, variant) for variant in variants for network in networks if (network, variant) not in first]
    chosen = first[:1] + rest[-1:] if setting.rehearse else first + rest
    found = [Job(f"{network.name}, {variant}", partial(_row, setting, network, variant)) for network, variant in chosen]
    kernels = [Job(f"kernels of {network.name}", partial(_kernels, setting, network)) for network in (H6B, TSB)]
    return [found[0], *kernels[: setting.size(2, 1)], *found[1:]]


def _row(setting: Setting, network: Network, variant: Variant) -> Values:
    config = _config(setting, network, variant)
    size_px = _size_px(setting, network)
    reset_peak(setting.device)
    model = build(config, setting.device)
    if variant.compiled:
        # A rehearsal traces as well; to build kernels for a CPU would take minutes and show nothing.
        compile_blocks(model, "aot_eager" if setting.rehearse else BACKEND)
    run = partial(_pass, model, _images(setting, variant.images, size_px))
    seconds, first = _seconds(run, setting)
    planned = planned_gib(config, variant.images, size_px)
    rate = network_tflop(config, size_px, variant.images) / seconds
    values = {
        "images/s": variant.images / seconds,
        "model TFLOP/s": rate,
        "MFU": peak_share(rate, setting.device),
        "peak GiB": peak_gib(setting.device),
        "planned GiB": planned,
        "busy": busy_share(run, setting.device),
        "first pass s": first,
    }
    del model, run
    gc.collect()
    return values


def build(config: DetectionRun, device: torch.device) -> PIIP:
    """The network in bf16 with weights drawn on the device."""
    with torch.device("meta"):
        network = PIIP(config.model).train()
    network.set_precision(torch.bfloat16)
    network.to_empty(device=device)
    torch.manual_seed(0)
    for module in network.modules():
        reset: Callable[[], None] | None = getattr(module, "reset_parameters", None)
        if reset is not None and any(True for _ in module.parameters(recurse=False)):
            reset()
    return network


def planned_gib(config: DetectionRun, images: int, size_px: tuple[int, int]) -> float:
    """Weights, gradients and activations by the rehearsal that `piip-scale plan` rests on."""
    with torch.device("meta"):
        network = PIIP(config.model).train()
        batch = torch.empty(images, 3, *size_px)
    network.set_precision(torch.bfloat16)
    rehearsed = rehearse(network, network_parts(network), lambda: network(batch))
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    numel = sum(p.numel() for p in network.parameters())
    return (rehearsed.peak + 2 * (numel + trained)) / GIB


def _config(setting: Setting, network: Network, variant: Variant) -> DetectionRun:
    if setting.rehearse:
        return detector_config(checkpoint_blocks=variant.checkpoint)
    overrides = ["data.train_shards='-'", "data.val_shards='-'"]
    config = cast("DetectionRun", load_config(CONFIGS / network.config, overrides))
    branches = tuple(
        branch.model_copy(update={"checkpoint_blocks": variant.checkpoint, "pretrained": None})
        for branch in config.model.branches
    )
    return config.model_copy(update={"model": config.model.model_copy(update={"branches": branches})})


def _size_px(setting: Setting, network: Network) -> tuple[int, int]:
    return (SIZE_PX, SIZE_PX) if setting.rehearse else (network.height_px, network.width_px)


def _images(setting: Setting, images: int, size_px: tuple[int, int]) -> Tensor:
    return torch.randn(images, 3, *size_px, device=setting.device, dtype=torch.bfloat16)


def _pass(network: PIIP, images_BCHW: Tensor) -> None:
    features = network(images_BCHW)
    torch.stack([feature.float().square().mean() for feature in features]).sum().backward()
    network.zero_grad(set_to_none=False)


def _seconds(run: Callable[[], Any], setting: Setting) -> tuple[float, float]:
    """Seconds of a pass, and of the first one."""
    spent = []
    for _ in range(setting.size(2, 1)):
        spent.append(_clocked(run, setting.device))
    rounds = setting.size(5, 1)
    synchronize(setting.device)
    started = time.perf_counter()
    for _ in range(rounds):
        run()
    synchronize(setting.device)
    return (time.perf_counter() - started) / rounds, spent[0]


def _clocked(run: Callable[[], Any], device: torch.device) -> float:
    started = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - started


def busy_share(run: Callable[[], Any], device: torch.device) -> float:
    """Share of a call's time in which the device computes; the rest it waits for the host."""
    spent, kernels = _profiled(run, device)
    return sum(kernels.values()) / 1e6 / spent


def _profiled(run: Callable[[], Any], device: torch.device) -> tuple[float, Counter[str]]:
    """Seconds of a call, and microseconds of every kernel in it."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        # Without the host's operators: recording them slows the host, and makes a device look idle that is not.
        activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        seconds = _clocked(run, device)
    spent: Counter[str] = Counter()
    for event in profiler.key_averages():
        spent[event.key] += event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
    return seconds, spent


def _kernels(setting: Setting, network: Network) -> Values:
    variant = Variant(1, checkpoint=False)
    model = build(_config(setting, network, variant), setting.device)
    run = partial(_pass, model, _images(setting, 1, _size_px(setting, network)))
    run()
    _, spent = _profiled(run, setting.device)
    total = sum(spent.values()) or 1
    dearest = [
        f"{name[:100]}: {us / 1e3:.2f} ms, {us / total:.0%}" for name, us in spent.most_common(_NUM_KERNELS) if us > 0
    ]
    return {"device ms": total / 1e3, "kernels": len(spent), "dearest": dearest}
