"""One line that says how far a run is: redrawn on a terminal, repeated now and then elsewhere, as in a job's log."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from piip_scale.telemetry.meters import RateMeter, duration_text
from piip_scale.telemetry.records import StepRecord

# Between two lines of a log: a hundredth of the time so far, within these bounds, some 1,500 lines in a week.
_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 10.0, 600.0
_PAUSE_SHARE = 0.01
# Of a terminal's line, which takes a millisecond or two.
_REDRAWN_S = 1.0
_NUM_LOSSES_SHOWN = 3


class ProgressLine:
    """Shows a run's progress on standard error.

    Args:
        total_steps: Steps of the whole run.
        first_step: Steps done before this process.
        stream: Where to write; standard error where not given.
        shows_steps: Off, only notes are written.
    """

    def __init__(
        self, total_steps: int, first_step: int = 0, stream: TextIO | None = None, *, shows_steps: bool = True
    ) -> None:
        self._total, self._stream, self._shows_steps = total_steps, stream or sys.stderr, shows_steps
        self._meter = RateMeter()
        self._began_s, self._next_s = time.monotonic(), float("-inf")
        self._bar: Progress | None = None
        if shows_steps and self._stream.isatty():
            columns = (MofNCompleteColumn(), BarColumn(bar_width=20), TextColumn("{task.fields[text]}"))
            self._bar = Progress(*columns, console=Console(file=self._stream), auto_refresh=False)
            self._task = self._bar.add_task("", total=total_steps, completed=first_step, text="")
            self._bar.start()

    def step(self, record: StepRecord) -> None:
        """Shows one more step."""
        if not self._shows_steps:
            return
        self._meter.add(record.images, record.step_seconds, record.data_wait_seconds)
        now_s = time.monotonic()
        if now_s < self._next_s and record.step != self._total:
            return
        text = progress_text(record, self._meter, self._total)
        if self._bar is not None:
            self._next_s = now_s + _REDRAWN_S
            self._bar.update(self._task, completed=record.step, text=text, refresh=True)
        else:
            pause_s = _PAUSE_SHARE * (now_s - self._began_s)
            self._next_s = now_s + min(max(pause_s, _SHORTEST_PAUSE_S), _LONGEST_PAUSE_S)
            self.note(f"step {record.step}/{self._total}  {text}")

    def note(self, text: str) -> None:
        """Writes a line that stays."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Leaves the last line standing."""
        if self._bar is not None:
            self._bar.stop()


def progress_text(record: StepRecord, meter: RateMeter, total_steps: int) -> str:
    """Rate, losses, learning rate, time left and data wait of a run, for people."""
    losses = sorted(((value, name) for name, value in record.losses.items() if "loss" in name), reverse=True)
    largest = "  ".join(f"{name.removeprefix('loss_')} {value:.3f}" for value, name in losses[:_NUM_LOSSES_SHOWN])
    left = duration_text((total_steps - record.step) * meter.seconds_per_step)
    shown = f" ({largest})" if len(losses) > 1 else ""
    return (
        f"{meter.rate:.2f} images/s  loss {record.total_loss:.3f}{shown}  lr {record.lr:.1e}  "
        f"data wait {meter.waiting_share:.0%}  left {left}"
    )
