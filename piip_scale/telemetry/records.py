"""Records of what a run logs: steps, its start, checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class RankPace:
    """How fast one rank is.

    Attributes:
        rank: The rank.
        node: Its machine.
        own_seconds: Of a step, what it takes itself, waiting for its data included: not what it waits for others.
        wait_seconds: The part of them that it waits for its loader.
    """

    rank: int
    node: str
    own_seconds: float
    wait_seconds: float


@dataclass(frozen=True)
class IntervalRecord:
    """What is only known of all steps since the ones written last, and of all ranks.

    Attributes:
        data_wait_share: Of their time, on the main rank, spent waiting for the loader.
        step_seconds: Wall time of one step.
        message_seconds: Of one step, while computing stood still for messages, mean over ranks; ``None`` where that is
            not measured.
        padding_share: Of the pixels of all images, those that only pad them to their batch's size.
        clipped_share: Of the steps, those whose gradient was clipped; ``None`` where nothing is.
        slowest: The rank whose own time is the longest; ``None`` where that is not measured.
        fastest: The one whose is the shortest.
        gpu_utilisation: Share of time in which a kernel ran, by the driver, mean over ranks; ``None`` where not known.
        gradient_norms: Of the last step's gradient before clipping, by part of the model.
        gammas: Mean absolute value of the interactions' gammas by branch that they flow into.
        merging_weights: By branch.
        attempt: Number of this start of the run, from 1; ``None`` where nobody counts.
        gpu_seconds: Time of all ranks of all attempts so far.
        useful_gpu_seconds: The part of it in steps that were applied and stay.
    """

    data_wait_share: float
    step_seconds: float
    message_seconds: float | None = None
    padding_share: float = 0.0
    clipped_share: float | None = None
    slowest: RankPace | None = None
    fastest: RankPace | None = None
    gpu_utilisation: float | None = None
    gradient_norms: Mapping[str, float] = field(default_factory=dict)
    gammas: Mapping[str, float] = field(default_factory=dict)
    merging_weights: Mapping[str, float] = field(default_factory=dict)
    attempt: int | None = None
    gpu_seconds: float = 0.0
    useful_gpu_seconds: float = 0.0


@dataclass(frozen=True)
class StepRecord:
    """One optimiser step, over all ranks.

    Attributes:
        step: Optimiser steps done since the start of the run once this one ended: 1 for the first, 121 for the first
            after resuming from the checkpoint of step 120.
        losses: Each named loss; those whose name holds ``loss`` add up to the total. Others are measures, as accuracy.
        lr: Base learning rate of this step, before layer-wise decay.
        images: Images of this step, of all ranks and micro-batches together.
        step_seconds: Wall time of this step, waiting for data included; saving and evaluating between steps left out.
        data_wait_seconds: The part of it spent waiting for the loader.
        forward_seconds: The part of it in forward passes, on the device of this rank.
        backward_seconds: In backward passes. What is left is the update, and what ends micro-batches.
        memory_bytes: Peak memory of this process so far: the device allocator's on a GPU, else resident memory;
            ``None`` between the steps that are written.
        grad_norm: Norm of the whole gradient before clipping, ``None`` where it is not computed.
        model_tflops: TFLOP/s of this rank by the count of the network's multiply-adds, waiting included.
        mfu: Their share of the device's peak, ``None`` where that is not known.
        broken_samples: Training samples that all ranks together had to replace since they started, ``None`` between
            the steps that are written.
        num_ranks: Ranks that share the images.
        memory_now_bytes: Memory of this process at the end of the step by kind, as ``memory.memory_now_bytes`` names
            it; empty between the steps that are written.
        interval: Of all steps since the ones written last; ``None`` between those.
    """

    step: int
    losses: Mapping[str, float]
    lr: float
    images: int
    step_seconds: float
    data_wait_seconds: float
    memory_bytes: int | None = None
    grad_norm: float | None = None
    model_tflops: float | None = None
    mfu: float | None = None
    broken_samples: int | None = None
    num_ranks: int = 1
    forward_seconds: float | None = None
    backward_seconds: float | None = None
    memory_now_bytes: Mapping[str, int] = field(default_factory=dict)
    interval: IntervalRecord | None = None

    @property
    def total_loss(self) -> float:
        """Sum of the losses proper."""
        return total_of(self.losses)


def total_of(losses: Mapping[str, float]) -> float:
    """Sum of the losses proper among named ones, those whose name holds ``loss``."""
    return sum(value for name, value in losses.items() if "loss" in name)


@dataclass(frozen=True)
class EvaluationRecord:
    """One evaluation.

    Attributes:
        metrics: By name; those of single classes are ``per_class/MEASURE/NAME``.
        pr_curves: Precision and recall of rising scores from 0 to 1, by what is scored, names of single classes after a
            slash: float64 (5, T) of right and wrong predictions, objects missed, precision and recall.
        pictures: JPEG files by the samples they show, the truth on the left.
    """

    metrics: Mapping[str, float]
    pr_curves: Mapping[str, npt.NDArray[np.float64]] = field(default_factory=dict)
    pictures: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class StartRecord:
    """A process's way to its first step.

    Attributes:
        step: The first step, as ``StepRecord`` counts.
        seconds: Of each phase, by name, in order.
        save_seconds: What a first save is expected to take; 0 where the run has saves, or nothing is known.
    """

    step: int
    seconds: Mapping[str, float]
    save_seconds: float = 0.0


@dataclass(frozen=True)
class SaveRecord:
    """One checkpoint, once it is visible.

    Attributes:
        step: Optimiser steps behind it.
        name: Its folder's name.
        stall_seconds: How long training stood still for it: waiting for the save before, copying to host memory.
        write_seconds: From then until it was visible, all ranks' files on the disk.
        num_bytes: Of all its files.
    """

    step: int
    name: str
    stall_seconds: float
    write_seconds: float
    num_bytes: int
