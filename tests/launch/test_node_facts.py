from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
from fakes import FakeStep, spec
from hypothesis import given
from hypothesis import strategies as st

from piip_scale.launch.bad_nodes import add_bad_nodes, choose_nodes, read_bad_nodes
from piip_scale.launch.checking import check_nodes
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
    assert "none looked at" in summary(answers(facts(gpus=(), reduction=None)), Needs(2, 0))
    # A node that is given whole comes with its own.
    assert "2 GPUs each, not asked for" in summary(answers(facts(reduction=None)), Needs(2, 0))


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


def test_a_sick_node_is_blamed_before_the_sum_that_fails_with_it():
    failed = [replace(one, reduction=Reduction("timed out")) for one in HEALTHY]
    told = [*failed[:3], replace(failed[3], gpus=(GPU,))]
    assert problems(*told) == {"n4": "1 GPUs are visible, 2 are needed"}
    assert shared_problem(answers(*told), {"n4"}) is None
    # Nor does one that did not answer make the sum everybody's fault.
    assert problems(*failed[:3], nodes=["n1", "n2", "n3", "n4"]) == {"n4": "did not answer within 120 s"}
    assert shared_problem(answers(*failed[:3]), {"n4"}) is None


def test_what_all_but_sick_nodes_say_is_shared_all_the_same():
    bad = [replace(one, data_error="config key a", data_reason="bad config") for one in HEALTHY[:3]]
    told = [*bad, replace(HEALTHY[3], memory_bytes=0)]
    assert shared_problem(answers(*told), problems(*told)) == ("bad config", "config key a")
    assert list(problems(*told)) == ["n4"]


def test_healthy_takes_an_answer_to_every_question():
    """n3 told of itself, and did not come back from the sum."""
    told = [*HEALTHY[:2], replace(HEALTHY[2], reduction=None), HEALTHY[3]]
    assert problems(*told) == {"n3": "all-reduce: it brought no result"}
    kind, line = shared_problem(answers(*(replace(one, reduction=None) for one in HEALTHY)))
    assert (kind, "4 of 4 nodes" in line) == ("communication", True)


def test_gpus_of_whole_nodes_count_as_the_ranks_do():
    whole = Needs(ranks_per_node=2, gpus_per_node=0)
    versions = VERSIONS | {"gpus": "2"}
    told = [facts(f"n{index}", versions=versions) for index in (1, 2, 3)]
    told += [facts("n4", gpus=(GPU,), versions=VERSIONS | {"gpus": "1"})]
    told += [facts("n5", gpus=(), versions=VERSIONS | {"gpus": "0"})]
    found = problems_of_nodes([one.node for one in told], answers(*told), whole, 120)
    assert list(found) == ["n4", "n5"]
    assert "1 GPUs are visible, 2 are needed" in found["n4"]
    assert found["n5"] == "GPUs 0, most nodes have 2"


class Preflight:
    """An executor whose step says something, and has some nodes answer."""

    def __init__(self, lines=(), answering=(), code=1) -> None:
        self.lines, self.answering, self.code = lines, answering, code
        self.arguments: list[str] = []

    def start(self, arguments, nodes, tasks_per_node, number, beats):
        self.arguments = list(arguments)

        def poll():
            for one in self.answering:
                save_facts(Path(arguments[1]), replace(one, unix_time_s=time.time()))
            return self.code

        return FakeStep(poll, lambda: 0, self.lines)


def check(tmp_path, executor, nodes=("n1", "n2"), bound_s=0.05):
    job = spec(tmp_path, ranks_per_node=2, gpus_per_node=2)
    return check_nodes(job, executor, nodes, 0, tmp_path / "answers", bound_s)


@pytest.mark.parametrize(
    ("lines", "code", "reason", "words"),
    [
        (["srun: unrecognized option '--bogus-option'"], 1, "bad config", "unrecognized option '--bogus-option'"),
        (["srun: fatal: cpus_per_task set by two different environment variables"], 1, "bad config", "cpus_per_task"),
        (
            ["srun: error: Unable to create step for job 7: Requested nodes are busy"],
            1,
            "launch",
            "Requested nodes are",
        ),
        (["slurmstepd: error: execve(): apptainer: No such file or directory"], 2, "launch", "execve(): apptainer"),
        (["srun: error: n[1-2]: tasks 0-1: Exited with exit code 127"], 127, "launch", "Exited with exit code 127"),
        ([], 3, "launch", "exit code 3"),
        ([], None, "launch", "none of 2 nodes answered"),
    ],
)
def test_a_preflight_that_could_not_run_says_so_and_blames_no_node(tmp_path, lines, code, reason, words):
    found = check(tmp_path, Preflight(lines, code=code))
    assert (found.healthy, found.problems) == ((), {})
    kind, line = found.shared_problem
    assert kind == reason
    assert line.startswith("the preflight could not run: ")
    assert words in line


def test_one_node_alone_that_does_not_answer_is_to_blame(tmp_path):
    found = check(tmp_path, Preflight(code=None), nodes=["n1"])
    assert (list(found.problems), found.shared_problem) == (["n1"], None)


def test_a_node_whose_look_at_itself_ended_is_named_with_how(tmp_path):
    lines = ["srun: error: n2: task 1: Bus error"]
    found = check(tmp_path, Preflight(lines, [HEALTHY[0]]))
    assert (found.healthy, found.shared_problem) == (("n1",), None)
    assert found.problems == {"n2": "its preflight ended without an answer (Bus error)"}


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
