"""What ranks saw between two steps that are written: added up on each, put together with the losses."""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from piip_scale.engine.branch_watch import BranchWatch, read
from piip_scale.engine.trainer import StepReport
from piip_scale.run.gpu_time import GpuTimeFile
from piip_scale.telemetry.device import gpu_utilisation
from piip_scale.telemetry.records import IntervalRecord, RankPace
from piip_scale.world import World

PREFIX = "interval "
"""Begins the names under which ranks exchange it, beside those of losses."""
_OWN, _WAIT = "own seconds of rank ", "waiting seconds of rank "
_MESSAGES, _GPU, _PIXELS, _REAL = "message seconds", "gpu utilisation", "pixels", "real pixels"


@dataclass
class _Sums:
    steps: int = 0
    clipped: int = 0
    seconds: float = 0.0
    wait_seconds: float = 0.0
    message_seconds: float | None = None
    pixels: int = 0
    real_px: int = 0

    def add(self, report: StepReport, clip_norm: float) -> None:
        """Adds a step."""
        result = report.result
        self.steps += 1
        self.clipped += result.applied and result.grad_norm > clip_norm > 0
        self.seconds += report.seconds
        self.wait_seconds += report.wait_seconds
        if result.message_seconds is not None:
            self.message_seconds = (self.message_seconds or 0.0) + result.message_seconds
        self.pixels += sum(height * width for height, width in result.sizes_px)
        self.real_px += result.real_px


class Interval:
    """This rank's share of what is written of the steps since those written last.

    Args:
        world: The ranks.
        device: This rank's.
        nodes: Name of each rank's node.
        clip_norm: ``optimizer.clip_grad_norm``; 0 where nothing is clipped.
        branches: Watches the branches.
        gpu_time: The run's, on the main rank.
        useful_s: GPU seconds in steps of the run that were done before and stay.
    """

    def __init__(
        self,
        world: World,
        device: torch.device,
        nodes: Sequence[str],
        clip_norm: float,
        branches: BranchWatch | None = None,
        gpu_time: GpuTimeFile | None = None,
        useful_s: float = 0.0,
    ) -> None:
        self._world, self._device, self._nodes, self._clip_norm = world, device, nodes, clip_norm
        self._branches, self._gpu_time, self._useful_s = branches, gpu_time, useful_s
        self._sums = _Sums()

    def add(self, report: StepReport) -> None:
        """Adds a step; not collective."""
        self._sums.add(report, self._clip_norm)
        if report.result.applied:
            self._useful_s += report.seconds * self._world.num_ranks

    def own(self, report: StepReport) -> dict[str, Tensor | float]:
        """This rank's numbers of the steps added since the last call of ``record``, for a mean over ranks.

        Args:
            report: The last of them.
        """
        sums = self._sums
        found: dict[str, Tensor | float] = {_PIXELS: float(sums.pixels), _REAL: float(sums.real_px)}
        if sums.message_seconds is not None:
            found[_MESSAGES] = sums.message_seconds / sums.steps
            own_s = max(sums.seconds - sums.message_seconds, 0.0) / sums.steps
            found |= self._of_rank(_OWN, own_s) | self._of_rank(_WAIT, sums.wait_seconds / sums.steps)
        if (utilisation := gpu_utilisation(self._device)) is not None:
            found[_GPU] = utilisation
        if self._branches:
            found |= self._branches.own(with_gradients=math.isfinite(report.result.grad_norm))
        return {f"{PREFIX}{name}": value for name, value in found.items()}

    def _of_rank(self, name: str, value: float) -> dict[str, float]:
        """A number of this rank whose mean over ranks is the number itself.

        Every rank names all ranks: where names differ they are exchanged, and there are as many lists as ranks.
        """
        mine, num_ranks = self._world.rank, self._world.num_ranks
        return {f"{name}{rank}": value * num_ranks if rank == mine else 0.0 for rank in range(num_ranks)}

    def record(self, means: MutableMapping[str, float], report: StepReport) -> IntervalRecord:
        """Takes its numbers out of the means over ranks, and begins the next interval."""
        found = {name.removeprefix(PREFIX): means.pop(name) for name in list(means) if name.startswith(PREFIX)}
        sums, self._sums = self._sums, _Sums()
        paces = sorted(self._paces(found), key=lambda pace: pace.own_seconds)
        norms, gammas, merging = read(found, report.result.grad_norm)
        return IntervalRecord(
            data_wait_share=sums.wait_seconds / sums.seconds if sums.seconds else 0.0,
            step_seconds=sums.seconds / sums.steps,
            message_seconds=found.get(_MESSAGES),
            padding_share=1.0 - found[_REAL] / found[_PIXELS] if found[_PIXELS] else 0.0,
            clipped_share=sums.clipped / sums.steps if self._clip_norm else None,
            slowest=paces[-1] if paces else None,
            fastest=paces[0] if paces else None,
            gpu_utilisation=found.get(_GPU),
            gradient_norms=norms,
            gammas=gammas,
            merging_weights=merging,
            attempt=self._gpu_time.attempt if self._gpu_time else None,
            gpu_seconds=self._gpu_time.spent_s() if self._gpu_time else 0.0,
            useful_gpu_seconds=self._useful_s,
        )

    def _paces(self, found: Mapping[str, float]) -> list[RankPace]:
        ranks = [int(name.removeprefix(_OWN)) for name in found if name.startswith(_OWN)]
        return [RankPace(rank, self._nodes[rank], found[f"{_OWN}{rank}"], found[f"{_WAIT}{rank}"]) for rank in ranks]
