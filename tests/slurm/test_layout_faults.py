"""A killed rank and a lost node in each layout of sharding, on two nodes of two ranks: runs end as if undisturbed."""

from __future__ import annotations

import os
import signal

import commands
import pytest
from jobs import Job

# Of two ranks "node" means what 2 means to as many processes of one machine, which the reference is.
LAYOUTS = {
    "all": {"zero__shard_over": "all"},
    "node": {"zero__shard_over": 2},
    "hpZ": {"zero__node_partition": 2},
    "ZeRO-2": {"zero__stage": 2},
}


def settings(layout):
    return Job.settings(data__num_streams=4, data__micro_batch_size=1, **LAYOUTS[layout])


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request):
    return request.param


@pytest.fixture(scope="module")
def undisturbed(config, layout, tmp_path_factory):
    """What each step tells of a run in the same layout on as many ranks, without Slurm."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    commands.succeeded(commands.piip_scale("train", config, "--procs", 4, "--run-dir", run_dir, *settings(layout)))
    return Job.told(run_dir)


@pytest.fixture
def held(job, layout):
    """A job whose four ranks wait."""
    job.ranks_per_node = 2
    chosen = settings(layout)
    job.start(settings=[word.replace("zero.shard_over=2", "zero.shard_over=node") for word in chosen])
    job.until_held()
    return job


def test_a_killed_rank_costs_the_steps_since_the_last_checkpoint(held, undisturbed):
    os.kill(held.pid(3), signal.SIGKILL)
    held.harmed()
    first = held.ended(0)
    held.go_on()
    _, second = held.finished()
    assert (first.end, first.ending.rank, first.ending.node) == ("crashed", 3, "n2")
    assert (second.end, second.restart_count) == ("done", 0)
    held.check_whole(undisturbed)


def test_a_lost_node_sends_the_job_through_the_queue(held, undisturbed):
    held.cluster.take_down("n2")
    held.harmed()
    first = held.ended(0)
    held.until_released()
    held.go_on()
    attempts = held.finished()
    assert first.end in ("lost_node", "cut", "stopped")
    assert (attempts[-1].end, attempts[-1].nodes) == ("done", ("n1", "n3"))
    held.check_whole(undisturbed)
