"""Processes that share work leave a terminal's Ctrl-C to the one that started them, from their first moment on."""

import os
import signal

from piip_scale.data.reading import pool


def test_an_interrupt_that_comes_while_processes_start_is_the_parents(monkeypatch):
    leave = pool.leave_to_parent

    def interrupted(numbers):
        os.kill(os.getpid(), signal.SIGINT)
        leave(numbers)

    monkeypatch.setattr(pool, "leave_to_parent", interrupted)
    assert pool.map_in_processes(str, [1, 2, 3], 2, lambda _: None) == ["1", "2", "3"]
