from __future__ import annotations

import os

import pytest

from piip_scale.errors import SlurmError
from piip_scale.launch.slurm_commands import Slurm
from piip_scale.launch.slurm_executor import ending
from piip_scale.launch.slurm_records import usable_nodes


@pytest.fixture
def slurm(cluster):
    yield Slurm(cluster.environment)
    cluster.run("scancel", "--full", "--user", str(os.getuid()), check=False)


@pytest.fixture
def submit(cluster):
    def submit(*options, script="sleep 60"):
        words = ["sbatch", "--parsable", "-o", "/dev/null", *options, "--wrap", script]
        return int(cluster.run(*words))

    return submit


def test_waiting_jobs_are_kept_from_nodes_and_taken_back(cluster, slurm, submit):
    job = submit("--hold", "-J", "a b|c")
    record = slurm.job(job)
    assert (record.state, record.restarts, record.limit_s, record.partition) == ("PENDING", 0, None, "gpu")
    assert ending(record, 0) == ""
    slurm.restrict(job, ["n1", "n3"])
    assert cluster.field(job, "ExcNodeList") == "n1,n3"
    following = submit(f"--dependency=afterany:{job}", "-J", "a b|c")
    submit(f"--dependency=afterany:{job}", "-J", "somebody else's")
    assert slurm.successors(job, "a b|c") == [str(following)]
    slurm.cancel([following])
    assert slurm.successors(job, "a b|c") == []


def test_nodes_are_known_by_name_address_and_state(cluster, slurm):
    assert slurm.hostnames("n[1-3]") == ("n1", "n2", "n3")
    assert slurm.hostnames("") == ()
    nodes = slurm.nodes(["n1", "n2"])
    assert {node.address for node in nodes.values()} == {"127.0.0.1"}
    assert not any(node.is_lost for node in nodes.values())
    assert len(usable_nodes(slurm.all_nodes().values(), ["gpu"])) == 3
    cluster.run("scontrol", "update", "nodename=n2", "state=drain", "reason=a bad fan")
    (node,) = slurm.nodes(["n2"]).values()
    assert (node.is_doubtful, node.is_lost, node.reason) == (True, False, "a bad fan")
    cluster.heal()


def test_refusals_are_one_line(slurm, submit):
    job = submit("--no-requeue", "--hold")
    with pytest.raises(SlurmError, match=f"scontrol requeue {job}: .*disabled"):
        slurm.requeue(job)
    with pytest.raises(SlurmError, match="Invalid job id"):
        slurm.job(999999)
