"""A whole step under ZeRO-3 with the optimiser: where its time goes, and what each variant changes."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any, cast

import torch

from piip_scale.config.detection import DetectionRun
from piip_scale.config.loading import load_config
from piip_scale.engine.fp32_precision import apply_fp32_precision
from piip_scale.engine.step import seed_step, total_loss
from piip_scale.engine.zero.setup import build_engine
from piip_scale.tasks.detection.model import build_detection_model
from piip_scale.world import World
from sections.gpu.backbone import CONFIGS, H6B, busy_share
from sections.gpu.jobs import Job, Setting, Values
from sections.gpu.timing import GIB, peak_gib, reset_peak, synchronize
from sections.gpu.work import NUM_CLASSES, network_tflop, peak_share
from sections.processes import run_ranks
from sections.subject import SIZE_PX, detector_config, made_up_batch

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

_WARM_UP, _STEPS = 2, 5
_PHASES = ("forward", "backward", "update")
# The whole state of H6B in float32 takes 130 GiB.
_WHOLE_STATE_GIB = 135
_VARIANTS: dict[str, list[str]] = {
    "as the recipe": [],
    "blocks kept": ["model.branches.0.checkpoint_blocks=False", "model.branches.1.checkpoint_blocks=False"],
    "not compiled": ["train.compile='off'"],
    "DeepSpeed's linear": ["zero.deepspeed={'zero_optimization': {'memory_efficient_linear': True}}"],
    "no layer decay": ["optimizer.layer_decay=1.0"],
    "gradients summed in bf16": ["zero.reduce_dtype='bf16'"],
    "float32 products exact": ["train.fp32_precision='ieee'"],
    "ZeRO-1": ["zero.stage=1"],
}


def jobs(setting: Setting) -> list[Job]:
    """Every variant on one image, then more images; a GPU that cannot hold the state freezes the 6B branch."""
    chosen = [(name, 1) for name in _VARIANTS] + [("as the recipe", 2), ("blocks kept", 2), ("as the recipe", 4)]
    label = "6B frozen, " * _freezes(setting)
    return [
        Job(f"{label}{name}, {images} image{'s' * (images > 1)}", partial(_row, setting, _VARIANTS[name], images))
        for name, images in (chosen[1:2] if setting.rehearse else chosen)
    ]


def _freezes(setting: Setting) -> bool:
    if setting.device.type != "cuda":
        return False
    return torch.cuda.get_device_properties(setting.device).total_memory < _WHOLE_STATE_GIB * GIB


def _row(setting: Setting, overrides: list[str], images: int) -> Values:
    if _freezes(setting):
        overrides = [*overrides, "model.branches.0.frozen_blocks='all'"]
    # A process of its own: DeepSpeed keeps what it once allocated.
    values: Values = run_ranks(1, _measure, setting, overrides, images)[0]
    return values


def _measure(world: World, device: torch.device, setting: Setting, overrides: list[str], images: int) -> Values:
    torch.set_num_threads(setting.size(16, 1))
    config = _config(setting, overrides, images)
    apply_fp32_precision(config.train)
    started = time.perf_counter()
    model = build_detection_model(config, NUM_CLASSES, network_device="meta")
    engine, _ = build_engine(model, config, world)
    build_s = time.perf_counter() - started
    size_px = setting.size(H6B.height_px, SIZE_PX)
    batches = [made_up_batch(step, images, size_px).to(device) for step in range(_WARM_UP + _STEPS)]
    reset_peak(device)
    steps = [_Step(engine, device) for _ in batches]
    for number, (step, batch) in enumerate(zip(steps, batches, strict=True)):
        step.run(batch, number)
    measured = steps[_WARM_UP:]
    times = {f"{phase} ms": median(step.device_ms(phase) for step in measured) for phase in _PHASES}
    hosts = {f"host {phase} ms": median(step.host_ms[phase] for step in measured) for phase in _PHASES}
    seconds = sum(times.values()) / 1e3
    rate = network_tflop(config, (size_px, size_px), images) / seconds
    return {
        "images/s": images / seconds,
        "model TFLOP/s": rate,
        "MFU": peak_share(rate, device),
        **times,
        **hosts,
        "busy": busy_share(partial(_Step(engine, device).run, batches[0], 0), device),
        "peak GiB": peak_gib(device),
        "build s": build_s,
    }


class _Step:
    """One step, its phases timed by the host's clock and by events on the device."""

    def __init__(self, engine: DeepSpeedEngine, device: torch.device) -> None:
        self._engine, self._device = engine, device
        self.host_ms: dict[str, float] = {}
        self._device_ms: dict[str, Callable[[], float]] = {}

    def run(self, batch: Any, number: int) -> None:
        """Forward, backward, update; waits for the device at the end only."""
        seed_step(0, number)
        loss = self._timed("forward", lambda: total_loss(self._engine(batch)))
        self._timed("backward", lambda: self._engine.backward(loss))
        self._timed("update", self._engine.step)
        synchronize(self._device)

    def device_ms(self, phase: str) -> float:
        """Between the events around a phase; the host's time where there are none."""
        return self._device_ms[phase]()

    def _timed(self, phase: str, run: Callable[[], Any]) -> Any:
        on_gpu = self._device.type == "cuda"
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if on_gpu else []
        started = time.perf_counter()
        if on_gpu:
            events[0].record()
        result = run()
        if on_gpu:
            events[1].record()
        spent = (time.perf_counter() - started) * 1e3
        self.host_ms[phase] = spent
        self._device_ms[phase] = (lambda: events[0].elapsed_time(events[1])) if on_gpu else (lambda: spent)
        return result


def _config(setting: Setting, overrides: list[str], images: int) -> DetectionRun:
    if setting.rehearse:
        checkpoint = not any("checkpoint_blocks=False" in text for text in overrides)
        return detector_config(checkpoint_blocks=checkpoint, train={"precision": "bf16"})
    fixed = ["train.precision='bf16'", "train.gradient_accumulation=1", f"data.micro_batch_size={images}"]
    fixed += [f"data.{name}_shards='-'" for name in ("train", "val")] + ["train.images_per_step=None"]
    # What the weights are takes no time: they are drawn.
    fixed += [f"model.branches.{index}.pretrained=None" for index in range(2)]
    return cast("DetectionRun", load_config(CONFIGS / H6B.config, [*fixed, *overrides]))
