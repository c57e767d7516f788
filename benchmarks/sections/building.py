"""How long the largest networks take to build, and in how much memory."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import psutil
import torch

from piip_scale.config.loading import load_config
from piip_scale.engine.zero.building import fill, load_whole
from piip_scale.models.counting import num_parameters
from piip_scale.models.piip import PIIP
from sections.record import table

CONFIGS = Path(__file__).parents[2] / "configs" / "coco"
H6B, LH6B = "mask_rcnn_h6b_1024_512", "mask_rcnn_lh6b_1536_1024_512"
_IMAGE_PX = 96
_FREE_BYTES = 18 * 2**30
_GIB = 2**30


def meta_section() -> str:
    """The family's largest networks on the meta device."""
    rows = [_in_a_fresh_process(_on_meta, name) for name in (H6B, LH6B)]
    head = ["network", "parameters (M)", "seconds", "peak resident memory, GiB", "of it torch and imports"]
    return (
        "Built without memory for weights, each in a process of its own. Seconds are the clock's, in brackets the "
        "processor's.\n\n" + table(head, rows)
    )


def bf16_section() -> str:
    """PIIP-LH6B with random bfloat16 weights.

    Raises:
        MemoryError: The machine has less memory free than the weights and some room take.
    """
    free = psutil.virtual_memory().available
    if free < _FREE_BYTES:
        raise MemoryError(f"{free / _GIB:.1f} GiB free, {_FREE_BYTES / _GIB:.0f} are needed")
    row = _in_a_fresh_process(_in_bf16, LH6B)
    head = ["network", "weights, GiB", "on meta, s", "drawing weights, s", f"{_IMAGE_PX} px image, s", "peak, GiB"]
    return (
        "Built on the meta device and cast there; then module by module drawn in float32 and kept in bfloat16. One "
        "forward pass of one image then has finite features. Seconds are the clock's, in brackets the processor's. "
        "Peak is of the process's resident memory, before and after the image.\n\n" + table(head, [row])
    )


def _in_a_fresh_process(measure: Callable[[str], list[str]], name: str) -> list[str]:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure, name).result()


def _peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / _GIB


class _Stopwatch:
    def __init__(self) -> None:
        self._clock, self._processor = time.perf_counter(), time.process_time()

    def __str__(self) -> str:
        return f"{time.perf_counter() - self._clock:.2f} ({time.process_time() - self._processor:.2f})"


def _build(name: str) -> tuple[PIIP, str]:
    config = load_config(CONFIGS / f"{name}.py").model
    watch = _Stopwatch()
    with torch.device("meta"):
        model = PIIP(config)
    return model, str(watch)


def _on_meta(name: str) -> list[str]:
    before = _peak_gib()
    model, seconds = _build(name)
    return [f"`{name}`", f"{num_parameters(model) / 1e6:,.0f}", seconds, f"{_peak_gib():.2f}", f"{before:.2f}"]


def _in_bf16(name: str) -> list[str]:
    model, building = _build(name)
    model.set_precision(torch.bfloat16)
    watch = _Stopwatch()
    fill(model, {}, 0, load_whole(torch.device("cpu")))
    drawing, peak = str(watch), f"{_peak_gib():.2f}"
    weights = sum(parameter.nbytes for parameter in model.parameters()) / _GIB
    watch = _Stopwatch()
    with torch.inference_mode():
        features = model.eval()(torch.randn(1, 3, _IMAGE_PX, _IMAGE_PX))
    assert all(feature.isfinite().all() for feature in features)
    return [f"`{name}`", f"{weights:.2f}", building, drawing, str(watch), f"{peak} / {_peak_gib():.2f}"]
