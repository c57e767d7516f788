"""What Slurm's commands print of jobs, steps and times, in the words of several versions and kinds of site."""

from __future__ import annotations

from dataclasses import replace

import pytest
from histories import attempt
from run_files import NOW, make_spec, write_attempt, write_beat, write_status

from piip_scale.errors import ConfigError, SlurmError
from piip_scale.launch import queue
from piip_scale.launch.options import parse_options
from piip_scale.launch.outcome import Evidence, judge
from piip_scale.launch.queue import ended_states, parse_ends, parse_queue
from piip_scale.launch.runs import describe, read_run, with_ends
from piip_scale.launch.slurm_records import parse_duration, parse_job
from piip_scale.launch.step_notes import read_notes

OOM = "slurmstepd: error: Detected 1 oom_kill event in StepId=12_3.0. Some of the step tasks have been OOM Killed."


@pytest.mark.parametrize(
    ("line", "nodes"),
    [
        ("srun: error: Node failure on n[02-03]", ("n02", "n03")),
        ("srun: error: Node failure on n[01-02,7]", ("n01", "n02", "n7")),
        ("slurmstepd-n1: error: *** STEP 12.0 ON n1 CANCELLED AT 2026-11-28T10:00:00 DUE TO NODE n2 FAILURE, SEE "
         "SLURMCTLD LOG FOR DETAILS ***", ("n2",)),
        ("slurmstepd: error: *** JOB 123_4 ON n1 CANCELLED AT 2026-11-28T10:00:00 DUE TO NODE FAILURE, SEE ... ***",
         ()),
        ("slurmstepd: error: *** STEP 123+1.0 ON n02 CANCELLED AT 2026-11-28T10:00:00 DUE TO TIME LIMIT ***", ()),
        ("slurmstepd: error: *** JOB 123_4 ON n02 CANCELLED AT 2026-11-28T10:00:00 DUE TO PREEMPTION ***", ()),
    ],
)  # fmt: skip
def test_nodes_that_slurm_lost(line, nodes):
    notes = read_notes([line])
    assert (notes.failed_nodes, notes.refusal, notes.first_end) == (nodes, "", None)


@pytest.mark.parametrize(
    ("line", "refusal"),
    [
        ("srun: error: n2: task 5: launch failed: Unspecified error", "tasks did not start on n2: Unspecified error"),
        ("srun: error: n[01-03,7]: tasks 0-3: launch failed: Slurmd could not connect IO",
         "tasks did not start on n01, n02, n03, n7: Slurmd could not connect IO"),
        ("srun: error: Task launch for 123.0 failed on node n3: Invalid job credential",
         "tasks did not start on n3: Invalid job credential"),
        ("srun: error: Task launch for StepId=123+1.0 failed on node n3: Socket timed out",
         "tasks did not start on n3: Socket timed out"),
        ("srun: error: task 5 launch failed: Unspecified error", "task 5 launch failed: Unspecified error"),
    ],
)  # fmt: skip
def test_tasks_that_never_began_were_killed_by_no_signal(line, refusal):
    notes = read_notes([line])
    assert (notes.refusal, notes.first_end, notes.is_final) == (refusal, None, False)
    ended = judge(attempt(), Evidence(exit_code=1, last_step=0, notes=notes), 1, NOW)
    assert ended.ending.reason == "launch"


def test_memory_counts_where_srun_was_cut_off_before_it_named_the_task():
    ended = judge(attempt(), Evidence(exit_code=137, last_step=0, notes=read_notes([OOM])), 1, NOW)
    assert (ended.end, ended.ending.reason, ended.ending.node) == ("crashed", "out of host memory", "")
    assert "--mem" in ended.ending.line


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        *(("1-00:00:00", 86400), ("2-03:04", 183840), ("1-12", 129600), ("30:00", 1800), ("0:30", 30), ("30", 30)),
        *((text, None) for text in ("UNLIMITED", "INVALID", "NOT_SET", "Partition_Limit", "")),
    ],
)
def test_times_as_slurm_shows_them(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    ("line", "name", "state", "nodes"),
    [
        ("12|12|N/A|COMPLETING|None|0:00|n1|/a/b", "12", "COMPLETING", "n1"),
        ("14|12|4|SUSPENDED|None|UNLIMITED|n[01-03,7]|/a b|c", "12_4", "SUSPENDED", "n[01-03,7]"),
        ("12|12|N/A|PENDING|Priority|INVALID||/a", "12", "PENDING", ""),
        ("12|12|N/A|REVOKED|None|1-00:00:00|N/A|/a", "12", "REVOKED", ""),
        ("13|12|N/A|RUNNING|None|30|(null)|(null)", "13", "RUNNING", ""),
    ],
)
def test_lines_of_the_queue(line, name, state, nodes):
    # Of several clusters squeue prints a heading, and one that was cut off ends anywhere.
    (job,) = parse_queue(f"CLUSTER: blue\n{line}\n12|12|N/A|RUNN")
    assert (job.name, job.state, job.nodes) == (name, state, nodes)


def test_a_component_of_a_heterogeneous_job_and_a_waiting_rest_of_an_array_are_read():
    common = "JobName=x UserId=a(1) GroupId=a(1) JobState=PENDING Restarts=0 RunTime=00:00:00 TimeLimit=UNLIMITED"
    both = f"JobId=123 HetJobId=123 HetJobOffset=0 {common}\nJobId=124 HetJobId=123 HetJobOffset=1 {common}\n"
    assert [parse_job(both, name).job_id for name in ("123", "124")] == [123, 124]
    rest = f"JobId=123 ArrayJobId=123 ArrayTaskId=5-9%2 ArrayTaskThrottle=2 {common}"
    assert parse_job(rest, "123_7").array_tasks == "5-9%2"
    with pytest.raises(SlurmError, match="no job 125"):
        parse_job(both, "125")


@pytest.mark.parametrize("state", ["INVALID", "N/A", "UNLIMITED"])
def test_a_job_whose_run_time_is_not_known_is_read(state):
    line = f"JobId=1 JobName=x UserId=a(1) JobState=RUNNING Restarts=0 RunTime={state} TimeLimit=30:00"
    assert (parse_job(line).run_s, parse_job(line).limit_s) == (0, 1800)


@pytest.mark.parametrize("text", ["clusters=blue", "cluster=blue"])
def test_another_cluster_is_chosen_where_all_commands_follow(text):
    with pytest.raises(ConfigError, match="SLURM_CLUSTERS=NAME"):
        parse_options([text], "--sbatch")


ENDS = """\
12|CANCELLED by 1000
13|NODE_FAIL
14|RUNNING
14|OUT_OF_MEMORY
15.batch|FAILED
16|
"""


def test_of_a_job_that_ran_again_its_last_end_counts():
    assert parse_ends(ENDS) == {12: "CANCELLED", 13: "NODE_FAIL", 14: "OUT_OF_MEMORY"}


def test_where_a_site_keeps_no_accounts_the_controller_remembers_for_a_while(monkeypatch):
    asked = []

    def run(*words, **_):
        asked.append(words[0])
        if words[0] == "sacct" or words[-1] == "13":
            raise SlurmError("Slurm accounting storage is disabled")
        return "JobId=12 JobName=x UserId=a(1) JobState=TIMEOUT Restarts=0 RunTime=01:00:00 TimeLimit=01:00:00"

    monkeypatch.setattr(queue, "_run", run)
    assert ended_states([12, 13]) == {12: "TIMEOUT"}
    assert asked == ["sacct", "scontrol", "scontrol"]
    assert ended_states([]) == {}


@pytest.mark.parametrize(
    ("end", "state"),
    [
        *(("FAILED", "failed"), ("TIMEOUT", "timeout"), ("DEADLINE", "timeout"), ("NODE_FAIL", "node-lost")),
        *(("OUT_OF_MEMORY", "out-of-memory"), ("BOOT_FAIL", "node-lost"), ("PREEMPTED", "preempted")),
        *(("CANCELLED", "cancelled"), ("REVOKED", "cancelled"), ("COMPLETED", "lost"), ("", "lost")),
    ],
)
@pytest.mark.parametrize("status", ["running", None])
def test_a_run_whose_supervisor_and_guard_were_killed_has_the_state_that_slurm_knows(tmp_path, end, state, status):
    folder = tmp_path / "run"
    make_spec(folder)
    write_attempt(folder, 0)
    if status:
        write_status(folder, status, 7)
    (run,) = with_ends([read_run(folder, [])], lambda jobs: {jobs[0]: end} if end else {})
    row = describe(run, NOW)
    assert (row.state, row.job) == (state, "12")
    assert "piip-scale jobs requeue" in row.event
    assert (end.lower().replace("_", " ") or "without a report") in row.event


def test_slurm_is_asked_only_of_runs_that_ended_without_a_word(tmp_path):
    for name, end in (("done", "done"), ("alive", None)):
        make_spec(tmp_path / name)
        write_status(tmp_path / name, "done" if end else "running", 7)
        write_attempt(tmp_path / name, 0, **({"end": end, "decision": "finish"} if end else {}))
    write_beat(tmp_path / "alive")
    runs = [read_run(tmp_path / name, []) for name in ("done", "alive")]
    assert with_ends(runs, lambda _: pytest.fail("asked")) == [replace(run) for run in runs]
