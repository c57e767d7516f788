"""``piip-scale jobs --watch``: the table of runs, drawn again and again on a terminal."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from piip_scale.cli.jobs import Listing, printable, table
from piip_scale.launch.queue import ended_states

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from piip_scale.launch.runs import Row

_ASK_AGAIN_S = 60.0
_LINES_AROUND = 4
_INDENT = "    "
_STYLES = {
    "running": "green",
    "done": "green",
    "queued": "cyan",
    "submitted": "cyan",
    "waiting": "cyan",
    "stopping": "cyan",
    "stopped": "yellow",
    "cancelled": "yellow",
    "held": "yellow",
}
_NEEDS_A_LOOK, _WARNED = "bold red", "bold yellow"
# Of what goes on as it should; smaller numbers come first.
_UNHURRIED = 2


class Ends:
    """Asks Slurm's records seldom: they are another daemon's, and what they say of an ended job stays."""

    def __init__(self, ask: Callable[[Sequence[int]], Mapping[int, str]] = ended_states) -> None:
        self._ask, self._known, self._asked_s = ask, dict[int, str](), dict[int, float]()

    def __call__(self, job_ids: Sequence[int]) -> dict[int, str]:
        """What is known of these jobs' ends."""
        now_s = time.monotonic()
        unknown = [job for job in job_ids if job not in self._known]
        due = [job for job in unknown if now_s - self._asked_s.get(job, float("-inf")) > _ASK_AGAIN_S]
        if due:
            self._known |= self._ask(due)
            self._asked_s |= dict.fromkeys(due, now_s)
        return {job: self._known[job] for job in job_ids if job in self._known}


def watch_table(look: Callable[[], Listing], every_s: float, console: Console | None = None) -> None:
    """Draws what ``look`` finds until Ctrl-C.

    Args:
        look: Reads all runs.
        every_s: How often.
        console: The terminal; standard output where ``None``.
    """
    from rich.console import Console
    from rich.live import Live

    console = console or Console()
    try:
        with Live(console=console, auto_refresh=False, screen=True) as live:
            while True:
                rows, warning = look()
                live.update(frame(rows, warning, console.size.width, console.size.height, every_s), refresh=True)
                time.sleep(every_s)
    except KeyboardInterrupt:
        return


def frame(rows: Sequence[Row], warning: str, width: int, height: int, every_s: float) -> Text:
    """One picture of the table.

    Args:
        rows: All runs; those that need a look come first where not all have room.
        warning: A line below.
        width: Of the terminal, in letters.
        height: In lines.
        every_s: How often it is drawn.
    """
    from rich.text import Text

    shown = _that_fit(rows, width, max(height - _LINES_AROUND, 1))
    counts = Counter(row.state for row in rows)
    summary = ", ".join(f"{number} {state}" for state, number in counts.most_common()) or "no runs"
    head, *lines = table(shown, width)
    text = Text(f"{time.strftime('%H:%M:%S')}  {summary}"[:width], style="bold", no_wrap=True)
    text.append(f"\n{head}", "dim")
    for row, line in zip(shown, lines, strict=True):
        event = f"\n{_INDENT}{printable(row.news)}"[: width + 1] if _has_more(row, line) else ""
        text.append(f"\n{line}{event}", _style(row))
    hidden = f"{len(rows) - len(shown)} more have no room here; " if len(shown) < len(rows) else ""
    foot = "; ".join(filter(None, (f"{hidden}every {every_s:g} s, Ctrl-C leaves", warning)))
    text.append(f"\n{foot}"[: width + 1], "dim")
    return text


def _that_fit(rows: Sequence[Row], width: int, room: int) -> list[Row]:
    """All rows, or so many that their lines have room: those first that need a look."""
    _, *lines = table(rows, width)
    num_lines = {row.run: 1 + _has_more(row, line) for row, line in zip(rows, lines, strict=True)}
    if sum(num_lines.values()) <= room:
        return list(rows)
    ranked = sorted(rows, key=_urgency)
    ends = accumulate(num_lines[row.run] for row in ranked)
    return [row for row, end in zip(ranked, ends, strict=True) if end <= room]


def _has_more(row: Row, line: str) -> bool:
    """Whether a run that needs a look says why where the terminal is too narrow for it."""
    return _urgency(row) < _UNHURRIED and bool(row.news) and printable(row.news) not in line


def _style(row: Row) -> str:
    return _WARNED if row.needs_a_look else _STYLES.get(row.state, _NEEDS_A_LOOK)


def _urgency(row: Row) -> int:
    if row.state not in _STYLES:
        return 0
    if row.needs_a_look:
        return 1
    return _UNHURRIED if row.state not in ("done", "stopped", "cancelled") else _UNHURRIED + 1
