from __future__ import annotations

import pytest
from fakes import spec
from hypothesis import given
from hypothesis import strategies as st

from piip_scale.errors import SlurmError
from piip_scale.launch.slurm_commands import Slurm, parse_successors
from piip_scale.launch.slurm_executor import SlurmExecutor, ending, restricted, srun_command, successor_options
from piip_scale.launch.slurm_records import parse_duration, parse_job, parse_nodes, parse_partitions, usable_nodes
from piip_scale.world import Allocation

# As scontrol of Slurm 22.05 wrote it, shortened.
JOB = (
    "JobId=71 JobName=a run's UserId=root(0) GroupId=root(0) Priority=4294901759 JobState=RUNNING Reason=None "
    "Dependency=(null) Requeue=1 Restarts=1 ExitCode=0:0 RunTime=00:01:45 TimeLimit=1-00:02:00 "
    "PreemptEligibleTime=2026-11-25T22:24:17 PreemptTime=None Partition=gpu ReqNodeList=(null) ExcNodeList=n4 "
    "NodeList=n[1,3] BatchHost=n1 NumNodes=2 Command=/tmp/train.sbatch\n"
)
NODES = """\
NodeName=n1 Arch=x86_64 NodeAddr=127.0.0.1 NodeHostName=vm State=ALLOCATED ThreadsPerCore=1 Partitions=gpu,prio
NodeName=n2 Arch=x86_64 NodeAddr=10.0.0.2 State=DOWN+NOT_RESPONDING   Reason=Not responding [slurm@2026-11-25T22:47:21]
NodeName=n3 NodeAddr=n3 State=MIXED+DRAIN ThreadsPerCore=1 Reason=bad fan [root@2026-11-25T22:47:21]
NodeName=n4 NodeAddr=n4 State=IDLE* ThreadsPerCore=1
"""


def test_a_job_is_read_as_scontrol_tells_it():
    job = parse_job(JOB)
    assert (job.job_id, job.state, job.restarts, job.node_list) == (71, "RUNNING", 1, "n[1,3]")
    assert (job.run_s, job.limit_s, job.partition, job.is_preempted) == (105, 86520, "gpu", False)
    assert parse_job(JOB.replace("PreemptTime=None", "PreemptTime=2026-11-25T22:33:55")).is_preempted
    with pytest.raises(SlurmError, match="cannot read"):
        parse_job("slurm_load_jobs error")


def test_nodes_are_read_with_state_and_reason():
    nodes = parse_nodes(NODES)
    assert {name: (node.is_lost, node.is_doubtful) for name, node in nodes.items()} == {
        "n1": (False, False),
        "n2": (True, False),
        "n3": (False, True),
        "n4": (True, False),
    }
    assert nodes["n2"].line == "Slurm calls it down+not_responding (Not responding)"
    assert (nodes["n2"].address, nodes["n3"].reason) == ("10.0.0.2", "bad fan")


@given(st.integers(0, 40), st.integers(0, 23), st.integers(0, 59), st.integers(0, 59))
def test_durations(days, hours, minutes, seconds):
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    assert parse_duration(f"{days}-{hours:02}:{minutes:02}:{seconds:02}") == total
    assert parse_duration("UNLIMITED") is None


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({}, ""),
        ({"PreemptTime=None": "PreemptTime=2026-11-25T22:33:55"}, "preemption"),
        ({"Restarts=1": "Restarts=2", "RUNNING": "COMPLETING"}, "requeue"),
        ({"RUNNING": "COMPLETING"}, "cancel"),
        ({"RUNNING": "COMPLETING", "1-00:02:00": "00:01:45"}, "time limit"),
        ({"RUNNING": "COMPLETING", "1-00:02:00": "UNLIMITED"}, "cancel"),
        *(({"RUNNING": state}, "time limit") for state in ("TIMEOUT", "DEADLINE")),
        ({"RUNNING": "PREEMPTED"}, "preemption"),
        ({"RUNNING": "CANCELLED"}, "cancel"),
        *(({"RUNNING": state}, "") for state in ("SUSPENDED", "CONFIGURING", "NODE_FAIL")),
    ],
)
def test_why_a_job_ends(change, cause):
    text = JOB
    for old, new in change.items():
        text = text.replace(old, new)
    assert ending(parse_job(text), restart_count=1) == cause


def test_a_training_ends_together_and_a_look_at_nodes_does_not(tmp_path):
    job = spec(tmp_path, srun_options=("--container-image=a b",))
    training = srun_command(job, ["n1", "n3"], 8, 12, alone=False)
    assert training[:4] == ["srun", "--nodes=2", "--ntasks=16", "--ntasks-per-node=8"]
    assert {"--nodelist=n1,n3", "--cpus-per-task=12", "--kill-on-bad-exit=1", "--no-kill=off"} <= set(training)
    assert training[-1] == "--container-image=a b"
    look = srun_command(job, ["n1"], 1, None, alone=True)
    assert {"--kill-on-bad-exit=0", "--no-kill"} <= set(look)
    assert not any("cpus" in word for word in look)


def test_a_refusal_is_one_line(tmp_path):
    tool = tmp_path / "scontrol"
    tool.write_text("#!/bin/sh\necho 'Requested operation is presently disabled' >&2\necho more >&2\nexit 1\n")
    tool.chmod(0o755)
    with pytest.raises(SlurmError) as caught:
        Slurm({"PATH": f"{tmp_path}:/usr/bin:/bin"}).requeue(3)
    assert caught.value.line == "scontrol requeue 3: Requested operation is presently disabled more"


class ScriptedSlurm(Slurm):
    """A controller that says what a test wants."""

    def __init__(self, job=JOB, nodes=NODES) -> None:
        super().__init__({})
        self.told, self.told_nodes = parse_job(job), parse_nodes(nodes)
        self.calls: list[tuple] = []

    def job(self, job_id):
        return self.told

    def nodes(self, names):
        return {name: self.told_nodes[name] for name in names}

    def hostnames(self, node_list):
        return tuple(node_list.replace("n[1,3]", "n1 n3").split())

    def all_nodes(self):
        return self.told_nodes

    def reserved_nodes(self, reservation):
        return ("n1", "n5")

    def requeue(self, job):
        self.calls.append(("requeue", job))

    def restrict(self, job, excluded, required=None):
        self.calls.append(("restrict", job, tuple(excluded), required))


# Those of the job and two that are free.
_OF_GPUS = "CPUTot=8 ActiveFeatures=h100,ib Gres=gpu:h100:4(S:0) Partitions=gpu"
CLUSTER = NODES.replace("ThreadsPerCore=1", _OF_GPUS).replace("State=DOWN", "Partitions=gpu State=DOWN") + "".join(
    f"NodeName=n{index} NodeAddr=n{index} CPUTot=8 ActiveFeatures=ib State=IDLE Partitions=gpu\n" for index in (5, 6)
)


def executor(tmp_path, slurm, task=None, **more):
    allocation = Allocation(
        job_id=71, restart_count=1, node_list="n[1-4]", num_nodes=4, this_node="n1", array_task=task,
        array_job=None if task is None else 71,
    )  # fmt: skip
    return SlurmExecutor(spec(tmp_path, **more), allocation, slurm)


def test_nodes_are_lost_that_are_down_or_taken_but_not_those_of_a_job_that_leaves_them_all(tmp_path):
    nodes = ("n1", "n2", "n3", "n4")
    assert dict(executor(tmp_path, ScriptedSlurm()).lost(nodes)) == {
        "n2": "node n2 was lost: Slurm calls it down+not_responding (Not responding)",
        "n4": "node n4 was lost: Slurm calls it idle+not_responding",
    }
    taken = dict(executor(tmp_path, ScriptedSlurm(JOB.replace("n[1,3]", "n1"))).lost(("n1", "n3")))
    assert taken == {"n3": "node n3 was lost: Slurm took it from the job"}
    leaving = JOB.replace("n[1,3]", "(null)").replace("Restarts=1", "Restarts=2")
    assert dict(executor(tmp_path, ScriptedSlurm(leaving)).lost(("n1", "n3"))) == {}
    assert executor(tmp_path, ScriptedSlurm()).doubtful(nodes) == ("n3",)


def test_a_requeued_job_is_kept_from_a_node_unless_too_few_were_left(tmp_path):
    """n4 is the user's own exclusion, and stays one."""
    slurm = ScriptedSlurm(nodes=CLUSTER)
    assert executor(tmp_path, slurm).requeue(["n2"]) == "job 71 is back in the queue, without n2"
    assert slurm.calls == [("requeue", "71"), ("restrict", "71", ("n4", "n2"), None)]
    slurm = ScriptedSlurm(nodes=CLUSTER)
    assert executor(tmp_path, slurm, num_nodes=3, spares=1).requeue(["n2"]) == "job 71 is back in the queue"
    slurm = ScriptedSlurm(JOB.replace("Restarts=1", "Restarts=2"), nodes=CLUSTER)
    assert "Slurm has put the job back" in executor(tmp_path, slurm).requeue(["n2"])
    assert slurm.calls == [("restrict", "71", ("n4", "n2"), None)]


@pytest.mark.parametrize(
    ("change", "more", "is_affordable"),
    [
        ({}, {}, True),
        ({"ExcNodeList=n4": "ExcNodeList=n[4-5]"}, {}, True),
        ({"ExcNodeList=n4": "ExcNodeList=n[4-6]"}, {}, False),
        ({"NodeList=n[1,3]": "NodeList=n[1,3] Features=ib"}, {}, True),
        ({"NodeList=n[1,3]": "NodeList=n[1,3] Features=h100&ib"}, {}, False),
        ({"NodeList=n[1,3]": "NodeList=n[1,3] Features=[rack1|rack2]"}, {}, True),
        ({"NodeList=n[1,3]": "NodeList=n[1,3] Reservation=mine"}, {}, True),
        ({"NodeList=n[1,3]": "NodeList=n[1,3] Reservation=mine"}, {"num_nodes": 3}, False),
        ({"Partition=gpu": "Partition=other"}, {}, False),
        ({"Partition=gpu": "Partition=other,gpu"}, {}, True),
        ({}, {"ranks_per_node": 4, "gpus_per_node": 4}, False),
        ({}, {"ranks_per_node": 16}, False),
    ],
)
def test_what_is_affordable_depends_on_all_that_a_job_asks_of_nodes(tmp_path, change, more, is_affordable):
    """In service are n1 with GPUs, n5 and n6 without; n2 is lost, n3 drains, n4 is the user's exclusion."""
    job = JOB
    for old, new in change.items():
        job = job.replace(old, new)
    slurm = ScriptedSlurm(job, nodes=CLUSTER)
    executor(tmp_path, slurm, **more).requeue(["n2"])
    assert (len(slurm.calls) == 2) == is_affordable


def test_a_lost_node_is_none_that_a_job_must_get(tmp_path):
    asked = JOB.replace("ReqNodeList=(null)", "ReqNodeList=n[1-2]")
    slurm = ScriptedSlurm(asked, nodes=CLUSTER)
    executor(tmp_path, slurm).requeue(["n2"])
    assert slurm.calls[1] == ("restrict", "71", ("n4", "n2"), ("n1",))
    assert restricted(parse_job(asked), ["n3"]) == (("n4", "n3"), None)
    assert restricted(parse_job(asked), ["n1", "n2"]) == (("n4", "n1", "n2"), ())


def test_a_successor_has_the_users_nodes_and_the_first_deadline():
    job = parse_job(JOB.replace("ReqNodeList=(null)", "ReqNodeList=n[1-2] Deadline=2026-12-01T08:00:00"))
    assert successor_options("71", job, ["n2"]) == [
        "--dependency=afterany:71",
        "--exclude=n4,n2",
        "--nodelist=n1",
        "--deadline=2026-12-01T08:00:00",
    ]
    bare = parse_job(JOB.replace("ExcNodeList=n4", "ExcNodeList=(null) Deadline=N/A"))
    assert successor_options("71_3", bare, []) == ["--dependency=afterany:71_3"]


# As scontrol of Slurm 22.05 shows an array by its number, which is that of its last task too, and by one task's.
ARRAY = "".join(
    JOB.replace("JobId=71", f"JobId={number} ArrayJobId=71 ArrayTaskId={task}").replace("n[1,3]", node)
    for number, task, node in ((71, 2, "n3"), (73, 1, "n2"), (72, 0, "n1"))
)


def test_of_an_array_each_task_is_read_by_itself():
    found = {name: parse_job(ARRAY, name) for name in ("71_0", "71_1", "71_2", "71", "73")}
    assert {name: job.node_list for name, job in found.items()} == {
        "71_0": "n1",
        "71_1": "n2",
        "71_2": "n3",
        "71": "n3",
        "73": "n2",
    }
    with pytest.raises(SlurmError, match="no job 71_7 among 3"):
        parse_job(ARRAY, "71_7")


def test_every_command_is_about_the_one_task(tmp_path, monkeypatch):
    commands = []

    def run(self, *words):
        commands.append(words)
        if words[:3] == ("scontrol", "show", "job"):
            return ARRAY
        if words[:3] == ("scontrol", "show", "node"):
            return CLUSTER if len(words) == 4 else CLUSTER.splitlines()[0]
        return "n1" if "hostnames" in words else ""

    monkeypatch.setattr(Slurm, "_run", run)
    job = executor(tmp_path, Slurm({}), task=0, num_nodes=1)
    assert dict(job.lost(["n1"])) == {}
    assert job.why_ending() == ""
    job.requeue(["n2"])
    job.end_chain()
    named = [" ".join(words) for words in commands if any("71" in word for word in words)]
    assert named
    assert all("71_0" in line for line in named), named
    assert ("scontrol", "requeue", "71_0") in commands


@pytest.mark.parametrize(
    ("job", "found"),
    [
        ("71", ["80", "81_0", "81_1"]),
        ("71_0", ["80", "81_0", "82"]),
        ("71_1", ["80", "81_1"]),
        ("7", []),
        ("80", ["83"]),
    ],
)
def test_those_that_follow_a_job_or_a_task_are_known(job, found):
    """The lines of Slurm 22.05, where a job 71 and an array 71 stand for the two kinds."""
    lines = [
        "80|N/A|afterany:71(unfulfilled)|a|b",
        "81|0|afterany:71_*(unfulfilled)|a|b",
        "81|1|afterany:71_*(unfulfilled)|a|b",
        "82|N/A|afterany:71_0(unfulfilled)|a|b",
        "83|N/A|afterok:70,afterany:80(unfulfilled)|a|b",
        "84|N/A|afterany:71(unfulfilled)|c",
        "85|N/A|afterany:171(unfulfilled),afterany:711(unfulfilled)|a|b",
        "torn",
    ]
    assert parse_successors("\n".join(lines), job, "a|b") == found


def test_what_users_write_does_not_pass_for_the_controllers_word():
    name = "x JobId=9 JobState=FAILED Restarts=7"
    text = JOB.replace("JobName=a run's", f"JobName={name}").rstrip() + " WorkDir=/a NodeList=n9 Comment=Restarts=3\n"
    job = parse_job(text)
    assert (job.job_id, job.state, job.restarts, job.node_list) == (71, "RUNNING", 1, "n[1,3]")
    nodes = parse_nodes("NodeName=n1 State=DOWN Partitions=gpu Reason=sat State=IDLE Partitions=x NodeName=n7 [a@b]\n")
    assert list(nodes) == ["n1"]
    assert (nodes["n1"].states, nodes["n1"].partitions) == ({"DOWN"}, ("gpu",))


def test_partitions_are_read_with_their_limits():
    text = (
        "PartitionName=gpu Default=YES QoS=N/A DefaultTime=00:02:00 MaxTime=1-00:00:00 Nodes=n[1-3]\n"
        "PartitionName=long Default=NO QoS=big DefaultTime=NONE MaxTime=UNLIMITED Nodes=n[1-3]\n"
    )
    gpu, long = parse_partitions(text)
    assert (gpu.is_default, gpu.default_s, gpu.longest_s, gpu.qos) == (True, 120, 86400, "")
    assert (long.is_default, long.default_s, long.longest_s, long.qos) == (False, None, None, "big")


def test_nodes_are_usable_whose_size_is_not_known():
    nodes = parse_nodes("NodeName=a Partitions=gpu State=IDLE\n").values()
    assert [node.name for node in usable_nodes(nodes, ["gpu"], num_cpus=9)] == ["a"]


def test_where_nothing_can_follow_that_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(ScriptedSlurm, "successors", lambda *_: [])
    with pytest.raises(SlurmError, match="its script is not known"):
        executor(tmp_path, ScriptedSlurm(), requeue=False).requeue([])
