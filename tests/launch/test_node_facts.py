from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from piip_scale.launch.bad_nodes import add_bad_nodes, choose_nodes, read_bad_nodes
from piip_scale.launch.node_facts import (
    Answer,
    GpuFacts,
    Needs,
    NodeFacts,
    Reduction,
    load_facts,
    problems_of_nodes,
    save_facts,
    shared_problem,
    summary,
)
from piip_scale.launch.preflight import check_node

GIB = 2**30
GPU = GpuFacts("H100", 79 * GIB, 80 * GIB)
VERSIONS = {"driver": "570.1", "nccl": "2.27.3", "torch": "2.15.0", "python": "3.11.7", "package": "1"}
NEEDS = Needs(ranks_per_node=2, gpus_per_node=2)


def facts(node="n1", **more) -> NodeFacts:
    values = {"versions": VERSIONS, "gpus": (GPU, GPU), "free_disk_bytes": {"/tmp": 50 * GIB}, "unix_time_s": 1001.0}
    values |= {"memory_bytes": 64 * GIB, "reduction": Reduction(gib_s=9.5)}
    return NodeFacts(node=node, **values | more)


def answers(*told):
    return {one.node: Answer(one, asked_unix_s=1000.0, seen_unix_s=1002.0) for one in told}


def problems(*told, nodes=None):
    found = answers(*told)
    return problems_of_nodes(nodes or list(found), found, NEEDS, 120)


HEALTHY = [facts(f"n{index}") for index in range(1, 5)]


def test_healthy_nodes_have_no_problems_and_one_line():
    assert problems(*HEALTHY) == {}
    assert shared_problem(answers(*HEALTHY)) is None
    line = summary(answers(*HEALTHY), NEEDS)
    assert "2 GPUs each" in line
    assert "9.50 GiB/s" in line
    assert "none looked at" in summary(answers(facts(reduction=None)), Needs(2, 0))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"gpus": (GPU,)}, "1 GPUs are visible, 2 are needed"),
        ({"gpus": (GPU, replace(GPU, free_bytes=30 * GIB))}, "GPU 1 (H100) is in use: 30.0 of 80.0 GiB are free"),
        ({"gpus": (replace(GPU, error="3 wrong products"), GPU)}, "GPU 0 (H100): 3 wrong products"),
        ({"versions": VERSIONS | {"driver": "550.0"}}, "driver 550.0, most nodes have 570.1"),
        ({"versions": {**VERSIONS, "nccl": ""}}, "NCCL none, most nodes have 2.27.3"),
        ({"free_disk_bytes": {"/tmp": GIB // 2}}, "/tmp has 0.50 GiB free, 1 are needed"),
        ({"disk_errors": ("/tmp cannot be written: Read-only file system",)}, "/tmp cannot be written"),
        ({"memory_bytes": GIB}, "1.0 GiB of memory are available, 3 are needed"),
        ({"unix_time_s": 1012.0}, "its clock is at least 10 s ahead"),
        ({"unix_time_s": 990.0}, "its clock is at least 10 s behind"),
        ({"data_error": "shards/train holds no shards", "data_reason": "bad data"}, "shards/train holds no shards"),
        ({"reduction": Reduction("connection refused")}, "all-reduce: connection refused"),
    ],
)
def test_a_sick_node_is_named_with_what_it_has_and_what_is_needed(change, told):
    found = problems(*HEALTHY[:3], facts("n9", **change))
    assert list(found) == ["n9"]
    assert told in found["n9"]
    assert shared_problem(answers(*HEALTHY[:3], facts("n9", **change))) is None


def test_a_node_that_does_not_answer_fails_by_name():
    assert problems(*HEALTHY, nodes=["n1", "n2", "n3", "n4", "n5"]) == {"n5": "did not answer within 120 s"}


def test_what_ails_all_nodes_is_nobodys_fault():
    bad = [replace(one, data_error="config key a", data_reason="bad config") for one in HEALTHY]
    assert shared_problem(answers(*bad)) == ("bad config", "config key a")
    assert problems(*bad) == {}
    apart = [replace(one, reduction=Reduction("timed out")) for one in HEALTHY]
    kind, line = shared_problem(answers(*apart))
    assert (kind, "4 of 4 nodes" in line) == ("communication", True)
    assert problems(*apart) == {}


def test_without_gpus_none_are_looked_for():
    found = answers(facts(gpus=()))
    assert problems_of_nodes(["n1"], found, Needs(2, 0), 120) == {}


@given(asked=st.floats(0, 1e6), took=st.floats(0, 300), skew=st.floats(-100, 100))
def test_a_clock_is_blamed_only_for_what_the_time_of_answering_does_not_explain(asked, took, skew):
    told = facts(unix_time_s=asked + took / 2 + skew)
    found = problems_of_nodes(["n1"], {"n1": Answer(told, asked, asked + took)}, NEEDS, 120)
    assert bool(found) == (abs(skew) - took / 2 > 3) or abs(abs(skew) - took / 2 - 3) < 1e-3


def test_facts_travel_by_file(tmp_path):
    save_facts(tmp_path, HEALTHY[0])
    (tmp_path / "n7.json").write_text('{"node": ')
    assert load_facts(tmp_path) == {"n1": HEALTHY[0]}


def test_this_machine_tells_of_itself(tmp_path):
    check_node(tmp_path, None, (), 0, bound_s=100)
    ((node, told),) = load_facts(tmp_path).items()
    assert told.reduction is None
    assert told.memory_bytes > 0
    assert told.versions["torch"]
    found = {node: Answer(told, told.unix_time_s - 1, told.unix_time_s + 1)}
    assert set(problems_of_nodes([node], found, Needs(1, 0), 1)) <= {node}


def test_bad_nodes_are_kept_for_a_day_and_used_last(tmp_path):
    path = tmp_path / "bad_nodes.json"
    assert read_bad_nodes(path, 0) == {}
    add_bad_nodes(path, {"n2": "hung"}, 1000.0)
    add_bad_nodes(path, {"n3": "lost"}, 1000.0 + 3600)
    bad = read_bad_nodes(path, 1000.0 + 3700)
    assert (bad["n2"].reason, bad["n3"].reason) == ("hung", "lost")
    assert set(read_bad_nodes(path, 1000.0 + 24 * 3600 + 1)) == {"n3"}
    assert choose_nodes(("n1", "n2", "n3", "n4"), 2, bad) == ("n1", "n4")
    assert choose_nodes(("n1", "n2", "n3"), 2, bad) == ("n1", "n2")
    path.write_text("{")
    assert read_bad_nodes(path, 0) == {}
