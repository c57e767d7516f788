"""Work spread over processes that end with their parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from piip_scale.data.reading.parents_signals import held_back, leave_to_parent
from piip_scale.errors import DataError
from piip_scale.world import usable_cores

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

_PARENTS_SIGNALS = (signal.SIGINT,)
_WATCH_SECONDS = 0.5


def num_processes(workers: int | None, num_items: int) -> int:
    """Processes worth starting: as asked for, or one a core this process may use, but no more than there are items."""
    return max(1, min(workers if workers is not None else usable_cores(), num_items))


def map_in_processes(
    function: Callable[[_Item], _Result],
    items: Sequence[_Item],
    num_workers: int,
    on_done: Callable[[_Item], None],
) -> list[_Result]:
    """The function of every item, in order; the first error cancels what has not begun.

    Args:
        function: Importable by name; takes and gives what can be pickled.
        items: One call each.
        num_workers: Processes.
        on_done: Called with each finished item, in this process.

    Raises:
        DataError: A process died, or ``function`` raised it.
    """
    # Forking spares a script its `if __name__` guard and every process the imports.
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(num_workers, context, _start_worker, (os.getpid(),)) as pool:
        with held_back(_PARENTS_SIGNALS):
            futures: dict[Future[_Result], _Item] = {pool.submit(function, item): item for item in items}
        try:
            for future in as_completed(futures):
                future.result()
                on_done(futures[future])
        except BrokenProcessPool as error:
            raise DataError(
                "a process died", rule="most often of too little memory", fix="use fewer --workers"
            ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        return [future.result() for future in futures]


def _start_worker(parent_pid: int) -> None:
    """Leaves Ctrl-C to the parent, and ends with it should it be killed."""
    leave_to_parent(_PARENTS_SIGNALS)

    def watch() -> None:
        while os.getppid() == parent_pid:
            time.sleep(_WATCH_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
