"""Starting, saving and resuming on any number of ranks: no rank but the first does more where there are more."""

from __future__ import annotations

import pytest
from preloaded import run_ranks
from scaling import PHASES, costs
from sections.rank_costs import COSTS, RANKS

# A folder that two ranks make at once costs the later one a look, and a file that both read is opened once.
SLACK = 6


def measured(tmp_path, stage, num_ranks):
    """By phase, what rank 0 and what the others asked of the disk, and messages, the same for all."""
    ranks = run_ranks(num_ranks, costs, tmp_path, stage)
    found = {}
    for phase in PHASES:
        messages = {rank[phase].collectives for rank in ranks}
        assert len(messages) == 1
        first, *others = (rank[phase].total for rank in ranks)
        found[phase] = first, others, messages.pop()
    return found


def assert_as_by_the_formulae(found, num_ranks, stage):
    for phase, (first, others, messages) in found.items():
        cost = COSTS[stage][phase]
        assert first == pytest.approx(cost.of_first(num_ranks), abs=SLACK), phase
        assert sum(others) / len(others) == pytest.approx(cost.other, abs=SLACK), phase
        # A rank reads a file more where its slice lies in one rank's more: of 8, rank 5 reads three's and rank 1 two's.
        assert max(others) <= cost.other + 2 * SLACK, phase
        assert messages == cost.collectives, phase


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_operations_and_messages_are_those_of_the_formulae(tmp_path, num_ranks):
    assert_as_by_the_formulae(measured(tmp_path, 3, num_ranks), num_ranks, 3)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "num_ranks"), [(3, 8), (1, 2), (1, 4), (1, 8)])
def test_on_more_ranks_and_where_every_ranks_file_says_what_it_holds(tmp_path, stage, num_ranks):
    assert_as_by_the_formulae(measured(tmp_path, stage, num_ranks), num_ranks, stage)


def test_what_all_ranks_do_together_grows_no_faster_than_they():
    for cost in (cost for phases in COSTS.values() for cost in phases.values()):
        fewest, most = RANKS[0], RANKS[-1]
        assert cost.of_all(most) / cost.of_all(fewest) <= 1.01 * most / fewest
