"""Saves checkpoints until something kills it: run by test_store.py in a process of its own."""

import itertools
import json
import os
import shutil
import signal
import sys
import time
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


def each_of_two_ranks(root):
    """Two processes save as ranks do; rank ``victim`` is killed before its n-th change, and then the other."""
    moments = []
    for victim in (0, 1):
        for moment in itertools.count():
            folder = root / f"rank_{victim}_moment_{moment:03d}"
            store = CheckpointStore(folder, keep=2, milestone_every=4)
            for step in (4, 5, 6):
                save(store, step)
            store.begin(7)
            ranks = [start_rank(store, 7, rank, moment if rank == victim else None) for rank in (0, 1)]
            _, status = os.waitpid(ranks[victim], 0)
            if os.WIFSIGNALED(status):
                # The other may go on for a moment, as ranks of a real run do.
                time.sleep(0.02)
                os.kill(ranks[1 - victim], signal.SIGKILL)
            os.waitpid(ranks[1 - victim], 0)
            if os.WIFEXITED(status):
                assert (os.WEXITSTATUS(status), store.steps()) == (0, [4, 6, 7])
                shutil.rmtree(folder)
                break
            moments.append({"folder": str(folder), "committed": 7 in store.steps()})
    print(json.dumps(moments))


def start_rank(store, step, rank, moment):
    child = os.fork()
    if child:
        return child
    if moment is not None:
        kill_at(moment)
    names = ["a.pt", f"inner/{rank}.pt"] if rank == 0 else ["inner/b.pt"]
    for name in names:
        path = store.staging(step) / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content(step, name))
    store.finish_part(step, rank, names)
    while rank == 0 and store.finished_ranks(step) < 2:
        time.sleep(0.001)
    if rank == 0:
        store.commit(step)
    os._exit(0)


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
        case ["each of two ranks", root]:
            each_of_two_ranks(Path(root))
        case ["endless", root]:
            endless(Path(root))
        case ["once", root, step]:
            once(Path(root), int(step))
