"""For all tests: the long ones first, and nothing that hypothesis draws held to a clock, which a busy machine fails."""

import gc
import os
import signal
from pathlib import Path

import pytest
from fork_server import fork_workers
from hypothesis import HealthCheck, settings

# Read when torch and numpy are first imported. Threads of two workers on two cores wait for each other by spinning,
# which doubles what a small network costs.
os.environ.setdefault("OMP_NUM_THREADS", "1")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # As a shell's background job has it, which the processes of the tests of Ctrl-C would inherit.
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")

TESTS = Path(__file__).parent
LONG = ("engine", "cli", "tasks", "test_gpu_benchmark.py", "models", "data")
"""Of the longest tests: were their files the last to begin, one worker would be waited for."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes():
    """Has the workers forked, so that what they import is imported once."""
    fork_workers()


def pytest_collection_modifyitems(items):
    """Keeps the order within a folder; ``make test`` has its workers take files in this order."""
    ranks = {folder: rank for rank, folder in enumerate(LONG)}
    items.sort(key=lambda item: ranks.get(item.path.relative_to(TESTS).parts[0], len(LONG)))


def pytest_collection_finish():
    """Takes what was imported out of garbage collection: each full one would go over a million objects that stay."""
    gc.freeze()
