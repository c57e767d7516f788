from __future__ import annotations

import pytest
from fakes import spec
from hypothesis import given
from hypothesis import strategies as st

from piip_scale.errors import SlurmError
from piip_scale.launch.slurm_commands import Slurm, parse_duration, parse_job, parse_nodes
from piip_scale.launch.slurm_executor import SlurmExecutor, ending, srun_command
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


class ToldSlurm(Slurm):
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

    def partition_size(self, name):
        return 4

    def requeue(self, job_id):
        self.calls.append(("requeue", job_id))

    def exclude(self, job_id, nodes):
        self.calls.append(("exclude", job_id, tuple(nodes)))


def executor(tmp_path, slurm, **more):
    allocation = Allocation(job_id=71, restart_count=1, node_list="n[1-4]", num_nodes=4, this_node="n1")
    return SlurmExecutor(spec(tmp_path, **more), allocation, slurm)


def test_nodes_are_lost_that_are_down_or_taken_but_not_those_of_a_job_that_leaves_them_all(tmp_path):
    nodes = ("n1", "n2", "n3", "n4")
    assert dict(executor(tmp_path, ToldSlurm()).lost(nodes)) == {
        "n2": "node n2 was lost: Slurm calls it down+not_responding (Not responding)",
        "n4": "node n4 was lost: Slurm calls it idle+not_responding",
    }
    taken = dict(executor(tmp_path, ToldSlurm(JOB.replace("n[1,3]", "n1"))).lost(("n1", "n3")))
    assert taken == {"n3": "node n3 was lost: Slurm took it from the job"}
    leaving = JOB.replace("n[1,3]", "(null)").replace("Restarts=1", "Restarts=2")
    assert dict(executor(tmp_path, ToldSlurm(leaving)).lost(("n1", "n3"))) == {}
    assert executor(tmp_path, ToldSlurm()).doubtful(nodes) == ("n3",)


def test_a_requeued_job_is_kept_from_a_node_unless_too_few_were_left(tmp_path):
    slurm = ToldSlurm()
    assert executor(tmp_path, slurm).requeue(["n2"]) == "job 71 is back in the queue, without n2"
    assert slurm.calls == [("requeue", 71), ("exclude", 71, ("n2",))]
    slurm = ToldSlurm()
    assert executor(tmp_path, slurm, num_nodes=3, spares=1).requeue(["n2"]) == "job 71 is back in the queue"
    slurm = ToldSlurm(JOB.replace("Restarts=1", "Restarts=2"))
    assert "Slurm has put the job back" in executor(tmp_path, slurm).requeue(["n2"])
    assert slurm.calls == [("exclude", 71, ("n2",))]


def test_where_nothing_can_follow_that_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(ToldSlurm, "successors", lambda *_: [])
    with pytest.raises(SlurmError, match="its script is not known"):
        executor(tmp_path, ToldSlurm(), requeue=False).requeue([])
