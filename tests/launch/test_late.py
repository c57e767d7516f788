"""A run that stands still says which ranks all others wait for."""

from __future__ import annotations

import pytest
from run_files import NOW, job, make_spec, steps, write_attempt, write_beat, write_metrics, write_status

from piip_scale.launch.late import Placement, waits_for
from piip_scale.launch.runs import describe, read_run
from piip_scale.run.heartbeat import COMPUTING, WAITING, Beat

SILENT_S = 60.0


def beats(num_ranks=8, **changed):
    """Ranks that wait in the same message for four minutes, and what is changed of some."""
    found = {}
    for rank in range(num_ranks):
        given = {"number": 9, "collectives": 30, "phase": COMPUTING, "step": 121, "waiting_s": 230.0}
        given |= {"unix_time_s": NOW - 10.0, "host": f"machine-{rank // 4}", "pid": 40 + rank}
        found[rank] = Beat(rank=rank, **given | changed.get(f"rank_{rank}", {}))
    return found


SILENT = {"unix_time_s": NOW - 240.0, "step": 120}


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"rank_3": SILENT}, "waits for rank 3 on machine-0, after step 120, silent for 4m"),
        (
            {"rank_5": {"number": 8, "phase": WAITING, "step": 120}},
            "waits for rank 5 on machine-1, after step 120, waiting for data for 4m",
        ),
        # One that does not run has another fall behind: it is the one to look at.
        (
            {"rank_1": {"collectives": 29}, "rank_6": SILENT},
            "waits for rank 6 on machine-1, after step 120, silent for 4m",
        ),
        (
            {f"rank_{rank}": SILENT for rank in (4, 5, 6, 7)},
            "waits for all 4 ranks on machine-1, after step 120, silent for 4m",
        ),
        (
            {f"rank_{rank}": SILENT for rank in (2, 5, 6)},
            "waits for rank 2 on machine-0, after step 120, silent for 4m, and for 2 more",
        ),
        # Nobody is behind, or nobody is left.
        ({}, ""),
        ({f"rank_{rank}": SILENT for rank in range(8)}, ""),
    ],
)
def test_the_ranks_that_hold_up_all_others_are_named(changed, told):
    assert waits_for(beats(**changed), Placement(), SILENT_S, NOW) == told


def test_nodes_are_called_as_the_cluster_calls_them():
    there = beats(2, rank_1=SILENT)
    assert waits_for(there, Placement(2, ("n1", "n2"), 1), SILENT_S, NOW).startswith("waits for rank 1 on n2,")
    assert waits_for(there, Placement(3, ("n1", "n2", "n3"), 1), SILENT_S, NOW).endswith("and for 1 more")
    del there[1]
    told = waits_for(there, Placement(2, ("n1", "n2"), 1), SILENT_S, NOW)
    assert told == "waits for rank 1 on n2, without any sign so far"


@pytest.fixture
def still(tmp_path):
    """A job of two nodes whose rank 0 waits for five minutes."""
    folder = tmp_path / "run"
    folder.mkdir()
    make_spec(folder, num_nodes=2)
    write_status(folder, "running", 40)
    write_metrics(folder, [{"step": 1, "kind": "start", "total_steps": 100}, *steps(1, 40)])
    write_attempt(folder, nodes=("n1", "n2"), started_unix_s=NOW - 900)
    write_beat(folder, unix_time_s=NOW, waiting_s=300.0, number=9, step=40, host="elsewhere")
    return folder


def test_a_list_names_the_rank_of_a_run_that_stands_still(still):
    def found():
        # As of one moment, however slow the machine.
        row = describe(read_run(still, [job(still)]), NOW)
        return row.state, row.event

    write_beat(still, rank=1, number=9, unix_time_s=NOW, waiting_s=300.0, host="elsewhere")
    assert found() == ("stalled", "computing for 5m, after step 40")
    write_beat(still, rank=1, number=9, unix_time_s=NOW - 240, step=2, host="elsewhere")
    assert found() == ("stalled", "waits for rank 1 on n2, after step 2, silent for 4m")
    # What an earlier attempt left says nothing of this one.
    write_beat(still, rank=1, unix_time_s=NOW - 1000, host="elsewhere")
    assert found() == ("stalled", "waits for rank 1 on n2, without any sign so far")


def test_of_a_run_that_goes_on_only_the_main_ranks_file_is_read(still, monkeypatch):
    monkeypatch.setattr("piip_scale.launch.runs.read_beats", lambda *_: pytest.fail("a file of each node was read"))
    write_beat(still, step=40, waiting_s=3.0, host="elsewhere")
    assert describe(read_run(still, [job(still)]), NOW).state == "running"
