"""What one GPU shows within minutes: the sections of benchmarks/gpu.py, in the order they are run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sections.gpu.jobs import Job, Setting


@dataclass(frozen=True)
class Section:
    """A part of the script.

    Attributes:
        title: Its heading.
        module: Where its ``jobs(setting)`` stands; imported in the section's own process.
        wanted_s: Seconds it may take where time allows.
    """

    title: str
    module: str
    wanted_s: float


SECTIONS: dict[str, Section] = {
    "machine": Section("Machine and ceilings", "sections.gpu.machine", 40),
    "correctness": Section("Correctness against float64", "sections.gpu.correctness", 80),
    "kernels": Section("Kernels", "sections.gpu.kernels", 70),
    "backbone": Section("Backbones, forward and backward, no optimiser", "sections.gpu.backbone", 300),
    "step": Section("A whole ZeRO-3 step", "sections.gpu.step", 300),
    "training": Section("A small training, from shards to AP", "sections.gpu.training", 240),
}

JobsOf = Callable[[Setting], list[Job]]
