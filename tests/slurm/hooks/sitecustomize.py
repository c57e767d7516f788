"""Put on the PYTHONPATH of tests' jobs: ranks, or a supervisor between two attempts, wait until a test has done its
harm, and a node looks sick.

Nothing of the product knows of it.
"""

import importlib.abc
import importlib.util
import os
import sys
import time
from pathlib import Path

HOLD, HOLD_AT, PAUSE, SICK = (os.environ.get(f"PIIP_TEST_{name}") for name in ("HOLD", "HOLD_AT", "PAUSE", "SICK"))


def hold_trainer(module):
    """Ranks wait after so many steps, and before each further one, while a file is there, unless asked to stop."""
    train_step = module.Trainer._train_step

    def held(self):
        while self.step >= int(HOLD_AT) and Path(HOLD).exists() and not self._stop:
            time.sleep(0.05)
        return train_step(self)

    module.Trainer._train_step = held


def hold_supervisor(module):
    """No attempt after the first begins while a file is there."""
    attempt = module.Supervisor._attempt_with_patience

    def held(self):
        while self._history.read() and Path(PAUSE).exists():
            time.sleep(0.05)
        return attempt(self)

    module.Supervisor._attempt_with_patience = held


def fill_disk(module):
    """A node without room on its local disk."""
    usage = module.shutil.disk_usage
    module.shutil.disk_usage = lambda folder: usage(folder)._replace(free=0)


PATCHES = {}
if HOLD:
    PATCHES["piip_scale.engine.trainer"] = hold_trainer
if PAUSE:
    PATCHES["piip_scale.launch.supervisor"] = hold_supervisor
if SICK and os.environ.get("SLURMD_NODENAME") == SICK:
    PATCHES["piip_scale.launch.preflight"] = fill_disk


class Patcher(importlib.abc.MetaPathFinder):
    """Runs a patch after a module."""

    def find_spec(self, name, path, target=None):
        """Finds it as others would, and adds to how it is run."""
        patch = PATCHES.pop(name, None)
        if patch is None:
            return None
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def run_and_patch(module):
            run(module)
            patch(module)

        spec.loader.exec_module = run_and_patch
        return spec


sys.meta_path.insert(0, Patcher())
