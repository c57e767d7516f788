import itertools
import os
import re
import shutil
import socket
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed import TCPStore

from piip_scale.errors import WorldError
from piip_scale.world import (
    Allocation,
    World,
    claimed_rank,
    given_meeting_point,
    held_port,
    outside_of_job,
    read_allocation,
    read_world,
    rendezvous_port,
    step_environment,
)

MEETING = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29400"}
TASKS_PER_NODE = st.lists(st.integers(1, 5), min_size=1, max_size=6)


def slurm_text(tasks_per_node):
    """Slurm's own shorthand: runs of equal counts as ``2(x3)``."""
    runs = [(count, len(list(same))) for count, same in itertools.groupby(tasks_per_node)]
    return ",".join(f"{count}(x{times})" if times > 1 else str(count) for count, times in runs)


def slurm_step(tasks_per_node, node, local, rank):
    """What Slurm 22.05 sets for one task of ``srun`` without ``--ntasks-per-node``."""
    text, num_tasks = slurm_text(tasks_per_node), str(sum(tasks_per_node))
    return MEETING | {
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(local),
        "SLURM_NODEID": str(node),
        "SLURM_STEP_ID": "0",
        "SLURM_STEPID": "0",
        "SLURM_STEP_NUM_TASKS": num_tasks,
        "SLURM_STEP_NUM_NODES": str(len(tasks_per_node)),
        "SLURM_STEP_TASKS_PER_NODE": text,
        "SLURM_NTASKS": num_tasks,
        "SLURM_NPROCS": num_tasks,
        "SLURM_TASKS_PER_NODE": text,
    }


def slurm_worlds(tasks_per_node):
    places = [(node, local) for node, count in enumerate(tasks_per_node) for local in range(count)]
    return [read_world(slurm_step(tasks_per_node, *place, rank)) for rank, place in enumerate(places)]


def test_alone():
    assert read_world({}) == World()
    assert World().is_main
    assert World().launcher == "single"


@given(TASKS_PER_NODE.filter(lambda tasks: sum(tasks) > 1))
def test_srun_with_any_spread_of_tasks(tasks_per_node):
    worlds = slurm_worlds(tasks_per_node)
    assert [world.rank for world in worlds] == list(range(sum(tasks_per_node)))
    assert {world.num_ranks for world in worlds} == {sum(tasks_per_node)}
    for node, count in enumerate(tasks_per_node):
        here = [world for world in worlds if world.node_rank == node]
        assert [world.local_rank for world in here] == list(range(count))
        assert {world.ranks_per_node for world in here} == {count}
    assert [world.is_main for world in worlds] == [True] + [False] * (len(worlds) - 1)
    assert all((w.launcher, w.master_address, w.master_port) == ("slurm", "10.0.0.1", 29400) for w in worlds)


def test_ranks_dealt_to_nodes_in_turn_know_their_node():
    """``srun --distribution=cyclic``: rank 1 is the first of node 1."""
    world = read_world(slurm_step([2, 2], node=1, local=0, rank=1))
    assert (world.rank, world.node_rank, world.local_rank) == (1, 1, 0)


def test_the_jobs_own_counts_are_not_the_steps():
    environment = slurm_step([2, 2], node=1, local=1, rank=3)
    environment |= {"SLURM_NTASKS": "64", "SLURM_NTASKS_PER_NODE": "32", "SLURM_TASKS_PER_NODE": "32(x2)"}
    assert read_world(environment).ranks_per_node == 2


@pytest.mark.parametrize(
    "environment",
    [
        {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8"},  # inside a batch script
        {"SLURM_NTASKS": "8", "SLURM_JOB_ID": "3"},  # under salloc
        slurm_step([1], 0, 0, 0),  # srun --pty bash, a step of one task
    ],
)
def test_a_shell_inside_a_job_is_alone(environment):
    assert read_world(environment) == World()


@given(
    ranks_per_node=st.integers(1, 8),
    num_nodes=st.integers(1, 6),
    data=st.data(),
    group_rank=st.booleans(),
)
def test_what_a_world_tells_torch_reads_back(ranks_per_node, num_nodes, data, group_rank):
    rank = data.draw(st.integers(0, ranks_per_node * num_nodes - 1))
    world = World(
        rank=rank,
        num_ranks=ranks_per_node * num_nodes,
        local_rank=rank % ranks_per_node,
        ranks_per_node=ranks_per_node,
        master_address="node7",
        master_port=1234,
        launcher="torchrun",
        node_rank=rank // ranks_per_node,
    )
    environment = world.as_environment()
    if not group_rank:
        del environment["GROUP_RANK"]
    assert read_world(environment) == world
    # torchrun under srun: one task per node starts the ranks.
    assert read_world(slurm_step([1, 1], 0, 0, 0) | environment) == world


def hook(environment):
    """What enroot's hook for PyTorch images sets in each task: the tasks of the job for those of the step."""
    more = {"MASTER_PORT": "61000", "WORLD_SIZE": environment.get("SLURM_NTASKS", "1")}
    more |= {"RANK": environment["SLURM_PROCID"], "LOCAL_RANK": environment["SLURM_LOCALID"]}
    return more | environment


@given(TASKS_PER_NODE.filter(lambda tasks: sum(tasks) > 1), st.integers(0, 64), st.integers(0, 6))
def test_variables_that_a_container_sets_for_each_task_change_nothing(tasks_per_node, more_tasks, kept):
    """Whichever of them a hook sets, and whatever it takes the number of ranks from."""
    for node, count in enumerate(tasks_per_node):
        local = count - 1
        step = slurm_step(tasks_per_node, node, local, sum(tasks_per_node[:node]) + local)
        hooked = hook(step | {"SLURM_NTASKS": str(sum(tasks_per_node) + more_tasks)})
        names = ["RANK", "WORLD_SIZE", "LOCAL_RANK"]
        for name in names[:kept]:
            partial = {key: value for key, value in hooked.items() if key not in set(names) - {name}}
            assert read_world(partial) == read_world(step)
        assert read_world(hooked) == read_world(step)


def test_a_hook_in_a_step_of_one_task_leaves_it_alone():
    """Also where it takes the ranks of the whole job for the step's."""
    assert read_world(hook(slurm_step([1], 0, 0, 0) | {"SLURM_NTASKS": "16"})) == World()


def test_torchrun_under_srun_counts_its_own_ranks():
    """Two nodes of two ranks: RANK and SLURM_PROCID agree on the first of them alone."""
    for node in range(2):
        for local in range(2):
            torchrun = {"RANK": str(2 * node + local), "WORLD_SIZE": "4", "LOCAL_RANK": str(local), **MEETING}
            torchrun |= {"LOCAL_WORLD_SIZE": "2", "GROUP_RANK": str(node), "TORCHELASTIC_RUN_ID": "x"}
            world = read_world(slurm_step([1, 1], node, 0, node) | torchrun)
            assert (world.rank, world.num_ranks, world.local_rank, world.launcher) == (
                2 * node + local, 4, local, "torchrun",
            )  # fmt: skip


def test_what_a_job_leaves_for_srun_does_not_contradict_its_options():
    job = {"SLURM_GPUS": "16", "SLURM_NTASKS": "24", "SLURM_CPUS_PER_TASK": "4", "SLURM_JOB_ID": "7", "HOME": "/h"}
    assert step_environment(job) == {"SLURM_CPUS_PER_TASK": "4", "SLURM_JOB_ID": "7", "HOME": "/h"}
    per_task = job | {"SLURM_TRES_PER_TASK": "cpu:4,gres/gpu:1"}
    assert "SLURM_CPUS_PER_TASK" not in step_environment(per_task)
    assert step_environment(per_task)["SLURM_TRES_PER_TASK"] == "cpu:4,gres/gpu:1"


def test_only_a_site_says_where_ranks_meet_not_the_shell_that_submitted():
    shell = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    assert given_meeting_point((), shell) == {}
    assert given_meeting_point(("OMP_NUM_THREADS", "MASTER_ADDR"), shell) == {"MASTER_ADDR": "localhost"}
    assert given_meeting_point(("MASTER_ADDR",), {}) == {}


TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"} | MEETING
SRUN = slurm_step([2], 0, 1, 1)


@pytest.mark.parametrize(
    ("environment", "change", "message"),
    [
        (TORCHRUN, {"WORLD_SIZE": None}, "environment variable WORLD_SIZE is not set"),
        (TORCHRUN, {"MASTER_PORT": None}, "environment variable MASTER_PORT is not set"),
        (TORCHRUN, {"LOCAL_RANK": "one"}, "environment variable LOCAL_RANK: got 'one'; it must be a whole number"),
        (TORCHRUN, {"RANK": "2"}, "rank out of range: got 2; 0 <= rank < 2"),
        (TORCHRUN, {"RANK": "-1"}, "rank out of range: got -1"),
        (TORCHRUN, {"LOCAL_WORLD_SIZE": "0"}, "local rank out of range: got 1"),
        (TORCHRUN, {"LOCAL_WORLD_SIZE": "3"}, "local rank < 3 ranks per node <= 2 ranks"),
        (TORCHRUN, {"MASTER_PORT": "70000"}, "master port out of range: got 70000; 1 <= port <= 65535"),
        (SRUN, {"MASTER_ADDR": None}, "environment variable MASTER_ADDR is not set; whoever starts the ranks sets it"),
        (SRUN, {"SLURM_LOCALID": None}, "environment variable SLURM_LOCALID is not set"),
        (SRUN, {"SLURM_STEP_NUM_TASKS": None}, "environment variable SLURM_STEP_NUM_TASKS is not set"),
        (SRUN, {"SLURM_STEP_TASKS_PER_NODE": "2x"}, r"SLURM_STEP_TASKS_PER_NODE: got '2x'; it reads like 2\(x3\),1"),
        (SRUN, {"SLURM_NODEID": "1"}, "names node 1, counted from 0"),
    ],
)
def test_variables_that_do_not_add_up(environment, change, message):
    changed = {k: v for k, v in (environment | change).items() if v is not None}
    with pytest.raises(WorldError, match=message):
        read_world(changed)


def test_real_torchrun():
    code = "from piip_scale.world import read_world; print(read_world())"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
    done = subprocess.run(
        [*command, sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=True
    )
    # Not by line: ranks share the pipe, and what one prints may stand between another's text and its newline.
    lines = sorted(re.findall(r"World\(.*?\)", done.stdout))
    for rank, line in enumerate(lines):
        assert f"rank={rank}, num_ranks=2, local_rank={rank}, ranks_per_node=2" in line
        assert "launcher='torchrun', node_rank=0" in line
    assert len(lines) == 2


@pytest.mark.slurm
@pytest.mark.skipif(
    shutil.which("srun") is None or "SLURM_CONF" not in os.environ, reason="needs a running Slurm named by SLURM_CONF"
)
def test_real_srun():
    code = "from piip_scale.world import read_world; print(read_world())"
    environment = os.environ | MEETING
    command = ["srun", "-N2", "-n3", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True, env=environment)
    # Not by line: ranks share the pipe, and what one prints may stand between another's text and its newline.
    lines = sorted(re.findall(r"World\(.*?\)", done.stdout))
    for line, (rank, local, count, node) in zip(lines, [(0, 0, 2, 0), (1, 1, 2, 0), (2, 0, 1, 1)], strict=True):
        assert f"rank={rank}, num_ranks=3, local_rank={local}, ranks_per_node={count}" in line
        assert f"launcher='slurm', node_rank={node}" in line


BATCH = {
    "SLURM_JOB_ID": "71",
    "SLURM_JOB_NODELIST": "n[2-3]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURMD_NODENAME": "n2",
    "SLURM_CONF": "/etc/slurm.conf",
    "SLURM_NTASKS_PER_NODE": "",
    "HOME": "/root",
}


def test_an_allocation_is_read_from_a_batch_jobs_variables():
    """As Slurm 22.05 sets them: no restart count on the first run, empty where the job did not ask."""
    first = read_allocation(BATCH)
    assert first == Allocation(71, 0, "n[2-3]", 2, "n2")
    more = {"SLURM_RESTART_COUNT": "2", "SLURM_NTASKS_PER_NODE": "8", "SLURM_CPUS_PER_TASK": "12"}
    again = read_allocation(BATCH | more | {"SLURM_GPUS_ON_NODE": "8", "SLURM_ARRAY_TASK_ID": "0"})
    assert again == Allocation(71, 2, "n[2-3]", 2, "n2", 8, 12, 8, 0)
    task = read_allocation(BATCH | {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_JOB_ID": "71"})
    assert (first.name, again.name, task.name) == ("71", "71", "71_3")
    assert read_allocation({"HOME": "/root"}) is None
    with pytest.raises(WorldError, match="SLURM_JOB_NODELIST is not set"):
        read_allocation({"SLURM_JOB_ID": "71"})


def test_another_jobs_command_does_not_see_this_jobs_variables():
    assert outside_of_job(BATCH) == {"SLURM_CONF": "/etc/slurm.conf", "HOME": "/root"}


@given(
    job=st.integers(1, 10**7), distance=st.integers(1, 2499), attempts=st.tuples(st.integers(1, 99), st.integers(1, 99))
)
def test_jobs_and_attempts_do_not_share_ports(job, distance, attempts):
    first, second = attempts
    assert 1024 < rendezvous_port(job, first) < 32768
    assert rendezvous_port(job, first) != rendezvous_port(job + distance, second)
    assert rendezvous_port(job, first) != rendezvous_port(job, first + 1)


def test_a_held_port_is_for_rank_0_and_nobody_else():
    with held_port() as port:
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
        store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        TCPStore("127.0.0.1", port, is_master=False).set("met", "yes")
        assert store.get("met") == b"yes"


@pytest.mark.parametrize(
    ("environment", "rank"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0"}, None),
        ({"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"} | MEETING, 1),
        # Worlds that do not add up: somebody still has to say so.
        ({"RANK": "1"}, 1),
        ({"RANK": "5", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"} | MEETING, 5),
        ({"RANK": "x"}, 0),
        ({"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3"}, 3),
        ({"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "many", "SLURM_PROCID": "3"}, 3),
    ],
)
def test_who_speaks_for_a_world_that_does_not_add_up(environment, rank):
    assert claimed_rank(environment) == rank
