"""For all tests: the long ones first, the same on every machine, and held to no clock, which a busy machine fails."""

import gc
import logging
import os
import random
import signal
import sys
from pathlib import Path

import pytest
from fork_server import fork_workers
from hypothesis import HealthCheck, settings

# What a machine or a shell sets for other programs, and tests would hear of: the width and colours of a terminal, whom
# a job's ranks would join, what Slurm's commands are asked.
_OF_OTHERS = ("TERM", "COLUMNS", "LINES", "FORCE_COLOR", "NO_COLOR", "PY_COLORS", "TTY_COMPATIBLE", "GITHUB_ACTIONS")
_OF_JOBS = ("SLURM_", "SBATCH_", "SQUEUE_", "SCANCEL_", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_", "MASTER_")
for _name in {name for name in os.environ if name in _OF_OTHERS or name.startswith(_OF_JOBS)} - {"SLURM_CONF"}:
    del os.environ[_name]
# Servers of tests are on this machine, which no proxy reaches.
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"

# Read when torch and numpy are first imported. Threads of two workers on two cores wait for each other by spinning,
# which doubles what a small network costs.
os.environ.setdefault("OMP_NUM_THREADS", "1")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # As a shell's background job has it, which the processes of the tests of Ctrl-C would inherit.
    signal.signal(signal.SIGINT, signal.default_int_handler)

_UNHURRIED = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
# What is refused for a draw of one run in a thousand is refused for nothing that was changed. Whoever looks for such
# draws says --hypothesis-profile=searching.
settings.register_profile("same", derandomize=True, **_UNHURRIED)
settings.register_profile("searching", max_examples=2000, **_UNHURRIED)
settings.load_profile("same")

TESTS = Path(__file__).parent
LONG = ("engine", "cli", "tasks", "test_gpu_benchmark.py", "models", "data")
"""Of the longest tests: were their files the last to begin, one worker would be waited for."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes():
    """Has the workers forked, so that what they import is imported once."""
    fork_workers()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup():
    """Has a test find the same, whichever came before it in its process: which do, the clock decides."""
    # Before pytest looks at loggers, which a command that ran in this process has set up.
    logger = logging.getLogger("piip_scale")
    logger.handlers.clear()
    logger.setLevel(logging.NOTSET)
    logger.propagate = True
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
    if "piip_scale.run.run_dir" in sys.modules:
        # Kept from the first call on, which a test with a clock of its own may be.
        sys.modules["piip_scale.run.run_dir"].process_start_unix_s()
    return (yield)


def pytest_collection_modifyitems(items):
    """Keeps the order within a folder; ``make test`` has its workers take files in this order."""
    ranks = {folder: rank for rank, folder in enumerate(LONG)}
    items.sort(key=lambda item: ranks.get(item.path.relative_to(TESTS).parts[0], len(LONG)))


def pytest_collection_finish():
    """Takes what was imported out of garbage collection: each full one would go over a million objects that stay."""
    gc.freeze()
