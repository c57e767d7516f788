"""Profiles some steps of an attempt with torch.profiler: a trace, and tables of what was dear."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from piip_scale.engine.hooks import Sink
from piip_scale.engine.profile_tables import RANGE, summarise
from piip_scale.engine.trainer import StepReport
from piip_scale.errors import RunError
from piip_scale.files import disk_errors
from piip_scale.logging import get_logger
from piip_scale.models.unit import Unit
from piip_scale.run.profiled_steps import ProfiledSteps
from piip_scale.run.run_dir import RunDirectory, write_text_atomic

MOST_TRACE_BYTES = 256 << 20
"""A larger trace opens in no browser, and is not kept."""
MOST_PROFILES = 3
"""A run that starts again often keeps those of its newest attempts."""
TRACE_SUFFIX = ".pt.trace.json.gz"
"""As TensorBoard's profiler plugin looks for."""

_SILENT = "6"
_BLOCK = re.compile(r"\.\d+$")


class ModuleRanges:
    """Marks each call of a module as a range of the profile, units as a whole and all modules outside of units.

    Its hooks return nothing, so that what is computed stays as it is.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = dict(_outside_of_units(model))
        self._open: list[tuple[nn.Module, Any]] = []
        self._handles: list[Any] = []
        self.rows = {name: _BLOCK.sub(".*", name) for name, m in self._modules.items() if isinstance(m, Unit)}

    def attach(self) -> None:
        """From now on."""
        for name, module in self._modules.items():
            # Around the hooks that gather parameters, whose time is the module's too.
            before = module.register_forward_pre_hook(self._enter(f"{RANGE}{name}"), prepend=True)
            self._handles += [before, module.register_forward_hook(self._leave, always_call=True)]

    def detach(self) -> None:
        """No longer."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _enter(self, name: str) -> Any:
        def enter(module: nn.Module, _arguments: Any) -> None:
            opened = record_function(name)
            opened.__enter__()
            self._open.append((module, opened))

        return enter

    def _leave(self, module: nn.Module, _arguments: Any, _output: Any) -> None:
        if self._open and self._open[-1][0] is module:
            self._open.pop()[1].__exit__(None, None, None)


def _outside_of_units(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    yield name or type(module).__name__, module
    if not isinstance(module, Unit):
        for child_name, child in module.named_children():
            yield from _outside_of_units(child, f"{name}.{child_name}" if name else child_name)


class Profiling:
    """A profile of the main rank; others wait for it while it is written.

    Nothing is exchanged among ranks, so this rank alone may have it. A disk that refuses costs the profile, not the
    training.

    Args:
        model: What is trained.
        device: Where.
        run: Takes the files, in ``profile/``.
        sink: Gets the verdict.
        steps: Which, since this attempt began.
        steps_before: Of the run, done before this attempt.
        everies: Each so many steps of the run something comes between them that no step's profile is to have.
        total_steps: Of the run.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        run: RunDirectory,
        sink: Sink,
        steps: ProfiledSteps,
        steps_before: int,
        everies: tuple[int, ...],
        total_steps: int,
    ) -> None:
        self._ranges, self._run, self._sink, self._steps = ModuleRanges(model), run, sink, steps
        self._last = steps.until(steps_before, *everies)
        self._before, self._on_gpu = steps_before, device.type == "cuda"
        self._profile: profile | None = None
        left = total_steps - steps_before
        self._is_over = left < steps.first
        if self._is_over:
            get_logger(__name__).warning("no profile: --profile %s, and this attempt has %d steps", steps, left)

    def step_ends(self, step: int) -> None:
        """Directly after a step: ends the warm-up or the profile."""
        if self._profile is not None and self._number(step) >= self._steps.first:
            if self._number(step) < self._last:
                self._profile.step()
            else:
                self._finish(step)

    def step_begins(self, step: int) -> None:
        """Directly before the step that follows ``step``: begins the warm-up or the profile."""
        if self._number(step) == self._steps.first - 2 and not self._is_over:
            self._begin()
        elif self._profile is not None and self._number(step) == self._steps.first - 1:
            self._profile.step()

    def give_up(self, step: int) -> None:
        """The attempt ends: keeps what there is."""
        if self._is_over:
            return
        if self._profile is not None and self._number(step) >= self._steps.first:
            self._finish(step)
            return
        self._stop()
        get_logger(__name__).warning(
            "no profile: --profile %s, and this attempt ended after its step %d", self._steps, self._number(step)
        )

    def _number(self, step: int) -> int:
        return step - self._before

    def _begin(self) -> None:
        if not self._on_gpu:
            # Kineto would tell standard error that there is no GPU.
            os.environ.setdefault("KINETO_LOG_LEVEL", _SILENT)
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self._on_gpu
        num_steps = self._last - self._steps.first + 1
        self._ranges.attach()
        # One more than are profiled: at the last one, torch would collect before we ask for it.
        plan = schedule(wait=0, warmup=1, active=num_steps + 1, repeat=1)
        self._profile = profile(activities=activities, schedule=plan)
        self._profile.start()

    def _stop(self) -> profile | None:
        done, self._profile, self._is_over = self._profile, None, True
        if done is not None:
            done.stop()
            self._ranges.detach()
        return done

    def _finish(self, step: int) -> None:
        done = self._stop()
        assert done is not None
        first = self._before + self._steps.first
        num_steps = step - first + 1
        summary = summarise(done.events(), num_steps, self._ranges.rows, on_gpu=self._on_gpu)
        name = f"steps_{first:08d}-{step:08d}"
        try:
            self._write(done, name, summary.text())
        except RunError as error:
            get_logger(__name__).warning("the profile is not kept: %s", error.line)
        get_logger(__name__).info("%s", summary.text().rstrip())
        steps = ProfiledSteps(first, step)
        self._sink.event(step, f"profile of {steps.words}: {summary.verdict}; see profile/{name}.txt")

    def _write(self, done: profile, name: str, text: str) -> None:
        folder = self._run.profile
        trace, part = folder / f"{name}{TRACE_SUFFIX}", folder / f".{name}.json.gz"
        with disk_errors(RunError, f"write {trace}"), _removed_at_last(part):
            folder.mkdir(parents=True, exist_ok=True)
            done.export_chrome_trace(str(part))
            if part.stat().st_size > MOST_TRACE_BYTES:
                get_logger(__name__).warning(
                    "the trace has %.0f MiB, more than %d, and is not kept: profile fewer steps",
                    part.stat().st_size / 2**20,
                    MOST_TRACE_BYTES >> 20,
                )
            else:
                os.replace(part, trace)
        write_text_atomic(folder / f"{name}.txt", text)
        self._remove_oldest(folder)

    def _remove_oldest(self, folder: Path) -> None:
        with disk_errors(RunError, f"remove old profiles of {folder}"):
            texts = sorted(folder.glob("steps_*.txt"), key=lambda path: path.stat().st_mtime)
            for path in texts[:-MOST_PROFILES]:
                path.with_name(f"{path.stem}{TRACE_SUFFIX}").unlink(missing_ok=True)
                path.unlink()


@contextmanager
def _removed_at_last(path: Path) -> Iterator[None]:
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


class EndProfile:
    """The first of all hooks, so that no profile has what the others do."""

    doing = "profiling"

    def __init__(self, profiling: Profiling) -> None:
        self._profiling = profiling

    def after_step(self, report: StepReport) -> None:
        """Directly after the step."""
        self._profiling.step_ends(report.step)

    def at_stop(self, step: int) -> None:
        """Keeps what there is."""
        self._profiling.give_up(step)

    def at_end(self, step: int) -> None:
        """Keeps what there is."""
        self._profiling.give_up(step)


class BeginProfile:
    """The last of all hooks, for the same reason."""

    doing = "profiling"

    def __init__(self, profiling: Profiling) -> None:
        self._profiling = profiling

    def after_step(self, report: StepReport) -> None:
        """Directly before the next step."""
        self._profiling.step_begins(report.step)

    def at_stop(self, step: int) -> None:
        """Nothing."""

    def at_end(self, step: int) -> None:
        """Nothing."""
