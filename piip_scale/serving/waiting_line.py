"""One network, one image at a time: whoever comes waits in a line of bounded length, for a bounded time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from piip_scale.errors import PiipError

T = TypeVar("T")


class LineFullError(PiipError):
    """So many wait already that another one is sent away."""


class TooLateError(PiipError):
    """What was asked for took longer than it may."""


class WaitingLine:
    """Runs functions one after the other beside the event loop.

    Args:
        most_waiting: So many may wait while one runs.
        seconds: So long may one wait and run; a function that has begun runs on, since threads cannot be stopped, and
            keeps its place until it is done.
    """

    def __init__(self, most_waiting: int, seconds: float) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="network")
        self._most, self._seconds = most_waiting + 1, seconds
        self.length = 0

    async def run(self, function: Callable[[], T]) -> T:
        """What a function returns, or raises.

        Raises:
            LineFullError: Too many wait.
            TooLateError: It was not done in time; it does not begin any more.
        """
        if self.length >= self._most:
            problem = f"{self.length} requests are being answered or wait"
            raise LineFullError(problem, rule=f"at most {self._most} may", fix="try again later")
        self.length += 1
        waited = self._thread.submit(function)
        waited.add_done_callback(_counter(self, asyncio.get_running_loop()))
        try:
            return await asyncio.wait_for(asyncio.wrap_future(waited), self._seconds)
        except asyncio.TimeoutError:
            problem = f"not done within {self._seconds:g} s"
            raise TooLateError(problem, fix="send a smaller image, or try again") from None

    def close(self) -> None:
        """Lets what runs end, and starts nothing more."""
        self._thread.shutdown(wait=True, cancel_futures=True)


def _counter(line: WaitingLine, loop: asyncio.AbstractEventLoop) -> Callable[[object], None]:
    def leave() -> None:
        line.length -= 1

    def answered(_: object) -> None:
        # Called in the thread that computed; the count belongs to the loop's.
        if not loop.is_closed():
            loop.call_soon_threadsafe(leave)

    return answered
