"""One line that says how far a run is: redrawn on a terminal, repeated now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from piip_scale.telemetry.meters import RateMeter, duration_text
from piip_scale.telemetry.records import StepRecord

_PLAIN_SECONDS = 10.0
_NUM_LOSSES_SHOWN = 3


class ProgressLine:
    """Shows a run's progress on standard error.

    Args:
        total_steps: Steps of the whole run.
        first_step: Steps done before this process.
        stream: Where to write; standard error where not given.
    """

    def __init__(self, total_steps: int, first_step: int = 0, stream: TextIO | None = None) -> None:
        self._total, self._stream = total_steps, stream or sys.stderr
        self._meter = RateMeter()
        self._last_plain = float("-inf")
        self._bar: Progress | None = None
        if self._stream.isatty():
            columns = (MofNCompleteColumn(), BarColumn(bar_width=20), TextColumn("{task.fields[text]}"))
            self._bar = Progress(*columns, console=Console(file=self._stream), refresh_per_second=4)
            self._task = self._bar.add_task("", total=total_steps, completed=first_step, text="")
            self._bar.start()

    def step(self, record: StepRecord) -> None:
        """Shows one more step."""
        self._meter.add(record.images, record.step_seconds, record.data_wait_seconds)
        text = progress_text(record, self._meter, self._total)
        if self._bar is not None:
            self._bar.update(self._task, completed=record.step, text=text)
        elif time.monotonic() - self._last_plain >= _PLAIN_SECONDS or record.step == self._total:
            self._last_plain = time.monotonic()
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
