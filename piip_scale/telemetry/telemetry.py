"""Everything a run logs, in one object: events for TensorBoard, JSON lines for scripts, a line for people."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from piip_scale.errors import RunError
from piip_scale.files import disk_errors
from piip_scale.run.run_dir import RunDirectory, State
from piip_scale.run.warned import WARNED_AT, WARNINGS
from piip_scale.telemetry.health import Health, Incident
from piip_scale.telemetry.jsonl import (
    JsonLines,
    evaluated_steps,
    last_number,
    last_steps,
    read_events,
    read_incidents,
    superseded_path,
)
from piip_scale.telemetry.memory import GIB
from piip_scale.telemetry.meters import RateMeter
from piip_scale.telemetry.pictures import PICTURES_FOLDER, keep_pictures
from piip_scale.telemetry.progress import ProgressLine
from piip_scale.telemetry.records import EvaluationRecord, SaveRecord, StartRecord, StepRecord
from piip_scale.telemetry.tensorboard import (
    USEFUL_GPU_HOURS,
    TensorBoardWriter,
    evaluation_scalars,
    interval_texts,
    picture_tags,
    save_scalars,
    start_scalars,
    step_overview,
    step_scalars,
)
from piip_scale.telemetry.trackers import TrackedRun, Tracking

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"


class Telemetry:
    """Writes ``metrics.jsonl`` and ``tensorboard/`` of a run directory, and the progress line. Main rank only.

    Args:
        run_dir: The run's directory; made where absent.
        total_steps: Optimiser steps of the whole run.
        first_step: Steps done before this process, the step of the checkpoint resumed from; what an earlier process
            wrote of later steps is superseded: moved to ``metrics.superseded.jsonl``, hidden in TensorBoard.
        show_progress: Show how far the run is; events, evaluations and saves are written in any case.
        log_every_steps: Write every n-th step's scalars; its rate is that of all n. The progress line sees each step.
        stream: Where the progress line goes; standard error where not given.

    Raises:
        RunError: The disk refuses; so do all methods.
    """

    def __init__(
        self,
        run_dir: Path,
        total_steps: int,
        first_step: int = 0,
        show_progress: bool = True,
        log_every_steps: int = 1,
        stream: TextIO | None = None,
    ) -> None:
        self._run_dir, self._total, self._every = Path(run_dir), total_steps, log_every_steps
        self._since_log = RateMeter(window=log_every_steps)
        self._action = f"write metrics in {run_dir}"
        with disk_errors(RunError, self._action):
            self._run_dir.mkdir(parents=True, exist_ok=True)
            self._lines = JsonLines(self._run_dir / METRICS_FILE, first_step)
            self._events = read_events(self._run_dir / METRICS_FILE)
            self._health = Health(
                Incident(step, text, at) for step, text, at in read_incidents(self._run_dir / METRICS_FILE)
            )
            self._evaluated = evaluated_steps(self._run_dir / METRICS_FILE)
            self._board = TensorBoardWriter(self._run_dir / TENSORBOARD_FOLDER, first_step)
        self._trackers: list[Tracking] = []
        self._tracked_to: dict[str, int] = {}
        self._progress = ProgressLine(total_steps, first_step, stream, shows_steps=show_progress)

    def describe(self, step: int, texts: Mapping[str, str], settings: Mapping[str, Any] | None = None) -> None:
        """Shows what the run was started with, beside its curves in TensorBoard.

        Args:
            step: Steps done before.
            texts: By name, as ``config`` and ``command``.
            settings: Keys that were changed from the recipe, with their values: how runs of a sweep differ.
        """
        with disk_errors(RunError, self._action):
            self._board.texts(step, texts)
            self._board.settings(settings or {})

    def track(self, names: Sequence[str], run: TrackedRun) -> None:
        """From here on logs to these trackers, too.

        Args:
            names: Of ``trackers.TRACKERS``.
            run: What they get of the run.
        """
        self._trackers = [Tracking(name, run) for name in names]
        if not names:
            return
        # They cannot take back what they have: steps that are done again are not sent again.
        with disk_errors(RunError, self._action):
            metrics = self._run_dir / METRICS_FILE
            self._tracked_to = last_steps([metrics, superseded_path(metrics)])

    def useful_gpu_seconds(self) -> float:
        """What earlier attempts wrote of the steps that stay."""
        with disk_errors(RunError, self._action):
            return last_number(self._run_dir / METRICS_FILE, USEFUL_GPU_HOURS) * 3600

    def step(self, record: StepRecord) -> None:
        """Logs one optimiser step."""
        self._since_log.add(record.images, record.step_seconds)
        self._progress.step(record)
        if record.step % self._every == 0 or record.step == self._total:
            self._written_step(record, self._since_log.rate)

    def _written_step(self, record: StepRecord, rate: float) -> None:
        interval = record.interval
        said = self._health.lines(record.step, interval) if interval else []
        others: dict[str, Any] = dict(interval_texts(interval)) if interval else {}
        if warnings := self._health.warnings(time.time()):
            others[WARNINGS] = list(map(asdict, warnings))
        self._write(record.step, "step", step_scalars(record, rate), step_overview(record, rate), others)
        for line in said:
            self.event(record.step, line)

    def evaluation(self, step: int, record: EvaluationRecord) -> None:
        """Logs an evaluation after ``step`` steps; one that the run's files have already is only shown."""
        if step not in self._evaluated:
            self._evaluated.add(step)
            self._write_evaluation(step, record)
        # Names with a slash are details, such as one class's share: files have them, a line has no room.
        shown = {name: value for name, value in record.metrics.items() if "/" not in name}
        self._progress.note(f"step {step}  " + "  ".join(f"{name} {value:.3f}" for name, value in shown.items()))

    def start(self, record: StartRecord) -> None:
        """Logs how the run came to its first step."""
        scalars = start_scalars(record)
        with disk_errors(RunError, self._action):
            # How far there is to go, for who reads the run's files alone.
            self._lines.write(record.step, "start", {**scalars, "total_steps": self._total})
            self._board.scalars(record.step, scalars)
        phases = ", ".join(f"{name.replace('_', ' ')} {seconds:.1f}" for name, seconds in record.seconds.items())
        self.event(record.step, f"{sum(record.seconds.values()):.1f} s from process to first step: {phases}")

    def save(self, record: SaveRecord) -> None:
        """Logs a checkpoint that is visible now."""
        self._write(record.step, "checkpoint", save_scalars(record))
        self.event(
            record.step,
            f"saved {record.name}: {record.num_bytes / GIB:.2f} GiB, stood still {record.stall_seconds:.2f} s, "
            f"written {record.write_seconds:.2f} s later",
        )

    def event(self, step: int, text: str) -> None:
        """Logs anything else worth a line: a sample skipped, a run resumed."""
        self._keep(step, text)
        self._progress.note(f"step {step}  {text}")

    def warning(self, step: int, text: str) -> None:
        """Logs what went wrong once, and shows it with the steps of a day."""
        now_s = time.time()
        self._health.add(Incident(step, text, now_s))
        self._keep(step, text, {WARNED_AT: now_s})
        self._progress.note(f"step {step}  {text}")

    def ending(self, step: int, text: str) -> None:
        """Logs how the run ends, for who reads its curves; at the terminal a rank reports it."""
        self._keep(step, text)

    def close(self, state: State = "stopped") -> None:
        """Writes what is left and ends the progress line.

        Args:
            state: How the run ended.
        """
        self._progress.close()
        for tracker in self._trackers:
            tracker.close(state)
        with disk_errors(RunError, self._action):
            try:
                self._lines.close()
            finally:
                self._board.close(is_done=state == "done")

    def _write_evaluation(self, step: int, record: EvaluationRecord) -> None:
        with disk_errors(RunError, self._action):
            self._lines.write(step, "evaluation", {f"eval/{name}": value for name, value in record.metrics.items()})
            self._board.scalars(step, evaluation_scalars(record.metrics))
            self._board.pr_curves(step, record.pr_curves)
            self._board.pictures(step, record.pictures)
            if record.pictures:
                keep_pictures(RunDirectory(self._run_dir).last_evaluation / PICTURES_FOLDER, record.pictures)
        self._track(step, "evaluation", evaluation_scalars(record.metrics), picture_tags(record.pictures))

    def _write(
        self,
        step: int,
        kind: str,
        values: Mapping[str, float],
        overview: Mapping[str, float] | None = None,
        others: Mapping[str, Any] | None = None,
    ) -> None:
        with disk_errors(RunError, self._action):
            self._lines.write(step, kind, {**values, **(others or {})})
            self._board.scalars(step, {**values, **(overview or {})})
        self._track(step, kind, {**values, **(overview or {})})

    def _track(
        self, step: int, kind: str, scalars: Mapping[str, float], pictures: Mapping[str, bytes] | None = None
    ) -> None:
        if step > self._tracked_to.get(kind, 0):
            for tracker in self._trackers:
                tracker.scalars(step, scalars)
                tracker.pictures(step, pictures or {})

    def _keep(self, step: int, text: str, others: Mapping[str, Any] | None = None) -> None:
        self._events.append((step, text))
        with disk_errors(RunError, self._action):
            self._lines.write(step, "event", {"text": text, **(others or {})})
            self._board.events(self._events)
