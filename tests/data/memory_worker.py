"""Measures a loader's process from a process that has nothing else in memory; prints growth and files as JSON.

A process that was forked from a large one seems to grow when the large one writes to what they share.
"""

import json
import sys

import psutil
from streams import loader

_LEAK_BYTES = 9_000


def measured(stream, num_batches, warm_up):
    """How much the worker grew after the warm-up, in bytes of its own, and the most files it had open and the first."""
    sizes, files, worker = [], [], None
    others = set(psutil.Process().children())
    for number, _ in enumerate(stream.batches(0)):
        if worker is None:
            (worker,) = set(psutil.Process().children()) - others
        if number % 20 == 0 and number < num_batches - 20:
            sizes.append(worker.memory_full_info().uss)
            files.append(worker.num_fds())
    # The least of several: what comes and goes between two looks is no growth.
    warm = warm_up // 20
    return min(sizes[-8:]) - min(sizes[warm : warm + 8]), max(files), files[0]


def make_leak(stream):
    """Has the worker keep as much of every batch as a decoded image takes."""
    sample, kept = stream.maker.sample, []

    def leaking(raw, rng):
        made = sample(raw, rng)
        kept.append(bytearray(_LEAK_BYTES))
        return made

    stream.maker.sample = leaking


if __name__ == "__main__":
    told = json.loads(sys.argv[1])
    stream = loader(told["place"], workers=1, micro_batch_size=1, num_streams=1, cache=told["cache"])
    if told["leaks"]:
        make_leak(stream)
    print(json.dumps(measured(stream, told["num_batches"], told["warm_up"])))
