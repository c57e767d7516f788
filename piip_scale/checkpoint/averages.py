"""Running averages of the trained weights: files of our own, cut as the masters beside them are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from piip_scale.checkpoint.stored import StoredFile, StoredSlice, Weight
from piip_scale.errors import CheckpointError

AVERAGE = "average"
"""The folder of running averages, and the key in each rank's file there of a list of flat tensors, one for each of its
flat master weights."""
UPDATES = "updates"
"""Key in these files of how often they were updated."""


def open_averages(folder: Path, num_ranks: int) -> list[StoredFile]:
    """The files of averages of all ranks, in the order of ranks.

    Args:
        folder: The checkpoint's.
        num_ranks: Ranks that have master weights of their own.

    Raises:
        CheckpointError: There are none, or not of all ranks.
    """
    paths = sorted((folder / AVERAGE).glob("rank_*.pt"))
    if len(paths) < num_ranks:
        raise CheckpointError(
            f"{folder / AVERAGE} has {len(paths) or 'no'} files of averaged weights",
            rule=f"a run with train.ema_decay writes {num_ranks} of them",
            fix="leave out --ema, or take a checkpoint of such a run",
        )
    return [StoredFile(path) for path in paths]


def num_updates(file: StoredFile) -> int:
    """How often the averages in a file were updated.

    Raises:
        CheckpointError: It does not say.
    """
    count = file.get(UPDATES)
    if type(count) is not int or count < 0:
        raise CheckpointError(f"{file.path}: {UPDATES}", value=count, rule="a number of updates")
    return count


def averaged_weights(weights: Mapping[str, Weight], files: Sequence[StoredFile]) -> dict[str, Weight]:
    """The same tensors, those that are trained from the files of averages."""

    def averaged(part: StoredSlice) -> StoredSlice:
        if not part.state_keys:
            return part
        return StoredSlice(part.slice, files[part.slice.rank], (AVERAGE, part.slice.group))

    # A parameter's two names keep sharing one weight.
    distinct = {id(weight): weight for weight in weights.values()}
    made = {key: replace(weight, parts=tuple(map(averaged, weight.parts))) for key, weight in distinct.items()}
    return {name: made[id(weight)] for name, weight in weights.items()}
