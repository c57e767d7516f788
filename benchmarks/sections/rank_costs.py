"""What starting, saving and resuming ask of the shared disk and of the network, as formulae of the number of ranks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sections.record import table

RANKS = (8, 16, 32, 64, 128, 256, 512)
_RANKS_PER_NODE, _MINUTE_S = 8, 60.0
_COCO_SETS, _COCO_SHARDS = 2, 80


@dataclass(frozen=True)
class Cost:
    """Operations on the shared disk: opening, looking, making, renaming, removing; and messages among ranks.

    Attributes:
        first: Of rank 0, whatever the number of ranks.
        first_per_rank: Of rank 0, for each rank.
        other: Of each other rank.
        collectives: That every rank takes part in.
    """

    first: float
    first_per_rank: float
    other: float
    collectives: int

    def of_first(self, num_ranks: int) -> float:
        """Operations of rank 0."""
        return self.first + self.first_per_rank * num_ranks

    def of_all(self, num_ranks: int) -> float:
        """Operations of all ranks together."""
        return self.of_first(num_ranks) + (num_ranks - 1) * self.other


def beats_a_minute(num_ranks: int) -> float:
    """Operations for heartbeats, errors and requests of a run whose nodes have eight ranks.

    The first rank of a node looks for an error and a request every two seconds, and reads, writes and renames its file
    every ten.
    """
    return num_ranks / _RANKS_PER_NODE * (2 * _MINUTE_S / 2 + 3 * _MINUTE_S / 10)


def beats_a_minute_before(num_ranks: int) -> float:
    """The same of a file for each rank: fourteen operations every two seconds."""
    return num_ranks * 14 * _MINUTE_S / 2


def opening_sets(num_ranks: int, num_sets: int, num_shards: int) -> float:
    """Operations for opening sets that are on the shared disk, of so many shards together.

    Each rank looks at a manifest and reads it, looks at each shard and reads its index, once.
    """
    return num_ranks * 2 * (num_sets + num_shards)


def opening_sets_before(num_ranks: int, num_sets: int, num_shards: int) -> float:
    """The same where each rank opened its sets twice, and looked at a shard twice each time."""
    return num_ranks * 2 * (2 * num_sets + 3 * num_shards)


COSTS: dict[int, dict[str, Cost]] = {
    3: {"start": Cost(15, 0, 0, 111), "save": Cost(90, 20, 27, 7), "resume": Cost(114, 12, 106, 114)},
    1: {"start": Cost(15, 0, 0, 39), "save": Cost(96, 14, 20, 6), "resume": Cost(106, 18, 109, 47)},
}
"""By ZeRO stage and phase, of a small model with averages; larger ones make more files of frozen weights and swapped
state, and more messages, as many on any number of ranks. Tests hold them on 2, 4 and 8 ranks."""


def section() -> str:
    """The formulae, evaluated up to 512 ranks."""
    rows = [
        [
            f"{phase}, stage {stage}",
            f"{cost.first:g} + {cost.first_per_rank:g} N",
            f"{cost.other:g}",
            cost.collectives,
            *(f"{cost.of_all(ranks):,.0f}" for ranks in RANKS),
        ]
        for stage, phases in COSTS.items()
        for phase, cost in phases.items()
    ]
    sets = f"opening {_COCO_SETS} sets of {_COCO_SHARDS} shards"
    for name, asked in (
        (sets, lambda ranks: opening_sets(ranks, _COCO_SETS, _COCO_SHARDS)),
        ("the same, twice a rank", lambda ranks: opening_sets_before(ranks, _COCO_SETS, _COCO_SHARDS)),
        ("a minute's heartbeats", beats_a_minute),
        ("the same, a file a rank", beats_a_minute_before),
    ):
        rows.append([name, "", "", "", *(f"{asked(ranks):,.0f}" for ranks in RANKS)])
    head = ["", "rank 0", "another rank", "messages", *map(str, RANKS)]
    return (
        "Operations on the disk that N ranks share (opening, looking, listing, making, renaming, removing), in the "
        "run's folder, the listings aside by which rank 0 waits for the others' parts of a save, twenty a second; and "
        "messages that each rank takes part in. Then what all N ranks ask for together, of sets in their own "
        "folders (COCO's two come to about so many shards).\n\n" + table(head, rows)
    )


def draw(path: Path) -> None:
    """What all ranks ask of the disk, by their number, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for phase, cost in COSTS[3].items():
        axes.plot(RANKS, [cost.of_all(ranks) for ranks in RANKS], marker="o", label=f"{phase}: all ranks")
        if cost.first_per_rank:
            axes.plot(RANKS, [cost.of_first(ranks) for ranks in RANKS], linestyle=":", label=f"{phase}: rank 0")
    for label, beats in (("heartbeats", beats_a_minute), ("heartbeats, a file a rank", beats_a_minute_before)):
        axes.plot(RANKS, [beats(ranks) for ranks in RANKS], linestyle="--", label=f"a minute of {label}")
    axes.set(xscale="log", yscale="log", xlabel="ranks", ylabel="operations on the shared disk", xticks=RANKS)
    axes.set_xticks(RANKS, list(map(str, RANKS)))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=90)
