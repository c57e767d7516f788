"""The largest published detector on one GPU: images/s, model FLOPS utilisation, memory."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from piip_scale.config.loading import load_config
from piip_scale.engine.step import train_step
from piip_scale.engine.utilisation import Utilisation, peak_tflops
from piip_scale.engine.zero.setup import build_engine
from piip_scale.tasks.counting import network_flops
from piip_scale.tasks.kinds import build_model
from piip_scale.world import World
from sections.processes import run_ranks
from sections.record import table
from sections.subject import made_up_batch

CONFIG = Path(__file__).parents[2] / "configs" / "coco" / "mask_rcnn_h6b_1024_512.py"
SIZE_PX = 1024
_WARM_UP, _STEPS = 3, 10
_GIB = 2**30
_NUM_CLASSES = 80


def section() -> str:
    """The table of one GPU; says so where there is none."""
    if not torch.cuda.is_available():
        return "PIIP-H6B 1024/512, Mask R-CNN: not measured: no GPU."
    rows = []
    for images in (1, 2, 4):
        found = run_ranks(1, throughput, images)[0]
        figures = (f"{found[key]:.2f}" for key in ("images_per_second", "tflops", "mfu", "memory_gib"))
        rows.append([images, *figures])
    return (
        f"PIIP-H6B 1024/512, Mask R-CNN, bf16, checkpointed blocks, optimiser in host memory, images of {SIZE_PX} px "
        "made up on the spot (no loader); branches, interactions and pyramid count for model TFLOP/s.\n\n"
        + table(["images a step", "images/s", "model TFLOP/s", "MFU", "peak GiB"], rows)
    )


def throughput(world: World, device: torch.device, images: int) -> dict[str, Any]:
    """Figures of a few steps of one rank."""
    overrides = ["zero.offload_optimizer='cpu'", "train.precision='bf16'", "train.gradient_accumulation=1"]
    # What the weights are takes no time: they are drawn.
    overrides += ["model.branches.0.pretrained=None", "model.branches.1.pretrained=None"]
    overrides += [f"data.micro_batch_size={images}", "data.train_shards='-'", "data.val_shards='-'"]
    config = load_config(CONFIG, overrides)
    with torch.device("meta"):
        model = build_model(config, _NUM_CLASSES)
    engine, _ = build_engine(model, config, world)
    for step in range(_WARM_UP):
        train_step(engine, [made_up_batch(step, images, SIZE_PX).to(device)], step, 0, world)
    torch.cuda.synchronize()
    sizes: list[tuple[int, int]] = []
    started = time.perf_counter()
    for step in range(_WARM_UP, _WARM_UP + _STEPS):
        result = train_step(engine, [made_up_batch(step, images, SIZE_PX).to(device)], step, 0, world)
        sizes += result.sizes_px
    torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    utilisation = Utilisation(partial(network_flops, config, _NUM_CLASSES), peak_tflops(device, "bf16"))
    tflops = utilisation.tflops(sizes, seconds)
    return {
        "images_per_second": len(sizes) / seconds,
        "tflops": tflops,
        "mfu": utilisation.mfu(tflops) or float("nan"),
        "memory_gib": torch.cuda.max_memory_allocated() / _GIB,
    }
