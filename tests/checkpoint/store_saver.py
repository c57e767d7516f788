"""Saves checkpoints until something kills it: run by test_store.py in a process of its own."""

import itertools
import json
import os
import shutil
import signal
import sys
from pathlib import Path

from piip_scale.checkpoint.store import CheckpointStore, read_step
from piip_scale.errors import CheckpointError

CHANGES = ("mkdir", "rename", "replace", "unlink", "rmdir", "fsync", "open")


def content(step, name):
    return f"{step}/{name}\n".encode() * 1000


def save(store, step):
    folder = store.begin(step)
    for name in ("a.pt", "inner/b.pt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content(step, name))
    return store.commit(step)


def kill_at(moment):
    """Replaces the functions of ``os`` that change a disk by ones that kill this process at the ``moment``-th call."""
    counter = itertools.count()

    def wrap(function):
        def wrapped(*args, **kwargs):
            if next(counter) == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return wrapped

    for name in CHANGES:
        setattr(os, name, wrap(getattr(os, name)))


def each(root):
    moments = []
    for moment in itertools.count():
        folder = root / f"moment_{moment:03d}"
        store = CheckpointStore(folder, keep=2)
        for step in (1, 2):
            save(store, step)
        child = os.fork()
        if child == 0:
            kill_at(moment)
            save(store, 3)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            shutil.rmtree(folder)
            assert os.WEXITSTATUS(status) == 0
            break
        moments.append({"folder": str(folder), "committed": 3 in store.steps()})
    print(json.dumps(moments))


def endless(root):
    store = CheckpointStore(root, keep=2)
    store.clean()
    newest = store.latest()
    for step in itertools.count(1 if newest is None else read_step(newest) + 1):
        save(store, step)
        print(step, flush=True)


def once(root, step):
    store = CheckpointStore(root, keep=2)
    try:
        (store.begin(step) / "a.pt").write_bytes(bytes(20_000))
        print(store.commit(step).name)
    except (OSError, CheckpointError) as error:
        store.abandon(step)
        print(str(error), file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["each", root]:
            each(Path(root))
        case ["endless", root]:
            endless(Path(root))
        case ["once", root, step]:
            once(Path(root), int(step))
