from __future__ import annotations

import pytest
from histories import attempt

from piip_scale.launch.outcome import Evidence, judge
from piip_scale.launch.step_notes import StepNotes, TaskEnd, read_notes
from piip_scale.run.ending import Ending
from piip_scale.run.run_dir import Status

# As srun of Slurm 22.05 wrote them.
KILLED = """\
4 images a step: 2 ranks x 2 x 1 accumulated
srun: error: n2: task 1: Killed
srun: launch/slurm: _step_signal: Terminating StepId=1.1
slurmstepd-n1: error: *** STEP 1.1 ON n1 CANCELLED AT 2026-11-25T22:47:21 ***
srun: error: n1: task 0: Exited with exit code 1
srun: Force Terminated StepId=1.1
"""
NODE = """\
srun: error: Node failure on n2
srun: error: n2: task 1: Killed
srun: launch/slurm: _step_signal: Terminating StepId=5.0
srun: error: n1: task 0: Killed
"""
REFUSED = "srun: error: Unable to create step for job 6: Requested node configuration is not available\n"


def test_srun_tells_who_was_first():
    killed = read_notes(KILLED.splitlines())
    ends = (("n2", "Killed"), ("n1", "Exited with exit code 1"))
    assert killed == StepNotes(TaskEnd("n2", 1, "Killed"), ends=ends)
    assert killed.first_end.by_signal
    node = read_notes(NODE.splitlines())
    assert (node.failed_nodes, node.first_end.node) == (("n2",), "n2")
    assert read_notes([REFUSED.strip()]).refusal.startswith("Unable to create step for job 6")
    many = read_notes(["srun: error: gpu-a.b: tasks 3-5,7: Exited with exit code 2"]).first_end
    assert (many.node, many.rank, many.by_signal) == ("gpu-a.b", 3, False)
    core = read_notes(["srun: error: n3: task 2: Segmentation fault (core dumped)"]).first_end
    assert (core.rank, core.by_signal) == (2, True)
    assert read_notes(["error: n2: task 1: Killed", ""]) == StepNotes()


# As srun and slurmstepd of Slurm 22.05 wrote them, or newer ones where the words say so.
@pytest.mark.parametrize(
    ("lines", "refusal", "is_final"),
    [
        (
            ["srun: unrecognized option '--bogus-option'", 'Try "srun --help" for more information'],
            "unrecognized",
            True,
        ),
        (["srun: option '--mpi' requires an argument"], "option '--mpi' requires", True),
        (
            ["srun: fatal: --mem, --mem-per-cpu, and --mem-per-gpu are mutually exclusive."],
            "--mem, --mem-per-cpu",
            True,
        ),
        (
            [
                "srun: fatal: cpus_per_task set by two different environment variables "
                "SLURM_CPUS_PER_TASK=1 != SLURM_TRES_PER_TASK=cpu:2"
            ],
            "cpus_per_task set by two",
            True,
        ),
        (['srun: error: Invalid numeric value "abc" for --cpus-per-task.'], "Invalid numeric value", True),
        (
            ["srun: error: cannot find mpi plugin for mpi/x", "srun: error: Invalid MPI type 'x', --mpi=list"],
            "MPI",
            True,
        ),
        (["srun: error: Only allocated 2 nodes asked for 5"], "Only allocated 2", True),
        (["srun: error: Invalid generic resource (gres) specification"], "generic resource", False),
        (["srun: error: Application launch failed: Invalid node name specified"], "Application launch failed", False),
        (["srun: error: Unable to create step for job 6: Job/step already completing"], "Unable to create", False),
        (
            ["srun: error: Task launch for StepId=7.0 failed on node n[1-2,07]: Communication connection failure"],
            "tasks did not start on n1, n2, n07: Communication",
            False,
        ),
        (
            [
                "slurmstepd-n1: error: execve(): apptainer: No such file or directory",
                "srun: error: n1: task 0: Exited with exit code 2",
            ],
            "execve(): apptainer: No such file",
            False,
        ),
        (["slurmstepd: error: pyxis: failed to import docker image"], "pyxis: failed to import", False),
        (["srun: error: some words that no list has"], "some words that no list has", False),
    ],
)
def test_what_keeps_a_step_from_beginning_is_read_whole(lines, refusal, is_final):
    notes = read_notes(lines)
    assert refusal in notes.refusal
    assert notes.is_final == is_final
    ended = judged(notes=notes)
    assert ended.ending.reason == ("bad config" if is_final else "launch")
    assert ended.ending.line.startswith("the ranks did not start: ")


def test_ranges_of_nodes_are_the_nodes_they_mean():
    notes = read_notes(["srun: error: n[1-2,07-08]: tasks 4-7: Out Of Memory", "srun: error: Node failure on n[3-4]"])
    assert notes.failed_nodes == ("n3", "n4")
    assert [node for node, _ in notes.ends] == ["n1", "n2", "n07", "n08"]
    assert (notes.first_end.node, notes.first_end.rank) == ("n1", 4)


@pytest.mark.parametrize(
    "lines",
    [
        ["srun: error: n1: task 0: Out Of Memory"],
        [
            "slurmstepd-n1: error: Detected 1 oom_kill event in StepId=5.0. Some tasks have been OOM Killed.",
            "srun: error: n1: task 0: Killed",
        ],
        [
            "srun: error: n1: task 0: Killed",
            "slurmstepd: error: Detected 1 oom-kill event(s) in StepId=5.0. Some of your processes were killed",
        ],
    ],
)
def test_a_rank_that_took_too_much_memory_is_no_fault_of_its_node(lines):
    ended = judged(notes=read_notes(lines))
    assert (ended.end, ended.ending.reason) == ("crashed", "out of host memory")
    assert "Out Of Memory" in ended.ending.line


@pytest.mark.parametrize(
    ("how", "by_signal"),
    [
        *((f"Exited with exit code {code}", False) for code in (0, 1, 2, 3, 85, 130, 143)),
        *((f"Exited with exit code {code}", True) for code in (134, 137, 139)),
        *(
            (how, True)
            for how in ("Killed", "Terminated", "Bus error", "Trace/breakpoint trap", "User defined signal 2")
        ),
    ],
)
def test_every_signal_is_one(how, by_signal):
    assert TaskEnd("n1", 0, how).by_signal == by_signal


@pytest.mark.parametrize(
    "line",
    [
        "slurmstepd-n1: error: couldn't chdir to `/x': No such file or directory: going to /tmp instead",
        "slurmstepd-n1: error: *** STEP 36.0 ON n1 CANCELLED AT 2026-11-28T08:02:17 ***",
        "srun: Job step aborted: Waiting up to 7 seconds for job step to finish.",
        "srun: launch/slurm: _step_signal: Terminating StepId=1.1",
        "srun: job 7 queued and waiting for resources",
    ],
)
def test_what_is_said_of_steps_that_ran_refuses_none(line):
    assert read_notes([line]) == StepNotes()


def judged(**evidence):
    return judge(attempt(0, None), Evidence(**{"exit_code": 1, "last_step": 8} | evidence), 4, 200.0)


def first(reason, **more):
    values = {"rank": 0, "line": "so it was", "exit_code": 1, "unix_time_s": 150.0, "reason": reason, "step": 11}
    return Ending(**values | {"node": "n1"} | more)


KILLED_NOTES = read_notes(KILLED.splitlines())
LOST = (("n2", "node n2 was lost: Slurm calls it down"),)


def test_the_runs_own_word_counts_more_than_any_exit_code():
    done = judged(exit_code=143, status=Status("done", 8), notes=KILLED_NOTES)
    assert (done.end, done.last_step, done.ended_unix_s) == ("done", 8, 200.0)
    stopped = judged(exit_code=143, status=Status("stopped", 8), cause="time limit")
    assert (stopped.end, stopped.ending.cause) == ("stopped", "time limit")
    silent = judged(exit_code=0, status=Status("running", 8))
    assert (silent.end, silent.ending.reason) == ("crashed", "lost rank")
    assert "exit code 0" in silent.ending.line


@pytest.mark.parametrize(
    ("evidence", "end", "kind", "rank", "node"),
    [
        ({"first_error": first("exception")}, "crashed", "exception", 0, "n1"),
        # Ranks that lost contact are the echo of the one that was killed, or of their node.
        ({"first_error": first("communication"), "notes": KILLED_NOTES}, "crashed", "lost rank", 1, "n2"),
        ({"first_error": first("communication")}, "crashed", "communication", 0, "n1"),
        ({"first_error": first("exception"), "notes": KILLED_NOTES}, "crashed", "exception", 0, "n1"),
        ({"notes": KILLED_NOTES}, "crashed", "lost rank", 1, "n2"),
        ({"first_error": first("communication"), "lost_nodes": LOST}, "lost_node", "lost node", None, "n2"),
        ({"notes": KILLED_NOTES, "lost_nodes": LOST}, "lost_node", "lost node", None, "n2"),
        # A bug in the config is one on any node.
        ({"first_error": first("bad config"), "lost_nodes": LOST}, "crashed", "bad config", 0, "n1"),
        # A rank that waited tells of a hang; the one it waited for is on the second node of four ranks each.
        ({"first_error": first("hang", late_rank=5)}, "hang", "hang", 5, "n2"),
        ({"first_error": first("hang")}, "hang", "hang", None, ""),
        ({"silence": "no rank gave any sign"}, "hang", "hang", None, ""),
        ({"notes": read_notes([REFUSED])}, "crashed", "launch", None, ""),
    ],
)
def test_the_cause_is_told_from_its_echoes(evidence, end, kind, rank, node):
    found = judged(**evidence)
    assert (found.end, found.ending.reason, found.ending.rank, found.ending.node) == (end, kind, rank, node)
    assert found.ending.line
    assert found.failed
