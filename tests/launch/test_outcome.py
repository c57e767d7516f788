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
    assert killed == StepNotes(TaskEnd("n2", 1, "Killed"))
    assert killed.first_end.by_signal
    node = read_notes(NODE.splitlines())
    assert (node.failed_nodes, node.first_end.node) == (("n2",), "n2")
    assert read_notes([REFUSED.strip()]).refusal.startswith("Unable to create step for job 6")
    many = read_notes(["srun: error: gpu-a.b: tasks 3-5,7: Exited with exit code 2"]).first_end
    assert (many.node, many.rank, many.by_signal) == ("gpu-a.b", 3, False)
    core = read_notes(["srun: error: n3: task 2: Segmentation fault (core dumped)"]).first_end
    assert (core.rank, core.by_signal) == (2, True)
    assert read_notes(["error: n2: task 1: Killed", ""]) == StepNotes()


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
