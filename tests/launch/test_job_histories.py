"""What befalls jobs, history by history: each goes on by itself, or ends with a line that says what to do."""

from __future__ import annotations

import json
import signal
import time
from dataclasses import replace

import pytest
from fakes import FakeStep, beat
from histories import NODES, attempt, crash, situation
from scenes import Scene
from test_outcome import judged

from piip_scale.errors import RunError, WorldError
from piip_scale.files import IO_REASON
from piip_scale.launch import time_left, unfinished, watching
from piip_scale.launch.decide import decide, sick_nodes, was_ended_for_good
from piip_scale.launch.run_metrics import SaveTimes, read_save_times
from piip_scale.launch.spec import Request, save_request
from piip_scale.launch.step_notes import read_notes
from piip_scale.launch.time_left import JobTime, TimeLeft, lead_s, too_short
from piip_scale.run.run_dir import RunDirectory

HOUR_S = 3600.0


@pytest.fixture
def scene(tmp_path):
    return Scene(tmp_path)


def deaf_step(scene) -> FakeStep:
    """Ranks that train, are asked to stop, and do not get their save done."""
    scene.run.heartbeats.mkdir(parents=True, exist_ok=True)
    step = FakeStep(lambda: [beat(scene.run, rank) for rank in range(2)] and None, lambda: None)
    scene.executor.steps.append(step)
    return step


def last_of(scene):
    return scene.history.read()[-1]


def supervise_until(scene, step, left_s, left_when_asked_s=None) -> int:
    """Supervises a job that has an hour when its ranks begin, and so many seconds when they are looked at.

    From when they are asked to stop it may have others.
    """
    supervisor, poll = scene.supervisor(), step._on_poll
    scene.executor.known_time = JobTime(HOUR_S, HOUR_S)

    def pass_time():
        if scene.executor.known_time.left_s == HOUR_S:
            tell(left_s)
        elif step.asked and left_when_asked_s is not None:
            tell(left_when_asked_s)
        return poll()

    def tell(seconds):
        scene.executor.known_time = JobTime(HOUR_S, seconds)
        supervisor._time_left._asked_s = None

    step._on_poll = pass_time
    return supervisor.run()


# A save that is slower than the time for it


def test_what_has_not_saved_in_time_is_ended_while_the_job_can_still_go_back(scene):
    step = deaf_step(scene)
    assert supervise_until(scene, step, lead_s(SaveTimes(), ()), time_left.LEAVING_S) == 0
    last = last_of(scene)
    assert (step.asked, step.ended, scene.executor.requeued) == (1, 1, [()])
    assert (last.end, last.ending.reason, last.ending.cause) == ("crashed", "late save", "time limit")
    assert last.waited_for_save_s > 0
    assert "had not saved" in last.ending.line


def test_ranks_that_never_began_are_ended_in_time_too(scene):
    scene.run.heartbeats.mkdir(parents=True, exist_ok=True)
    step = FakeStep(lambda: None, lambda: None)
    scene.executor.steps.append(step)
    assert supervise_until(scene, step, time_left.LEAVING_S) == 0
    assert (step.asked, step.ended, last_of(scene).decision) == (0, 1, "requeue")
    assert "had not begun" in last_of(scene).ending.line


def test_the_lead_follows_from_what_saves_took_and_from_those_that_were_late():
    measured = lead_s(SaveTimes(save_s=100.0, step_s=4.0), ())
    assert measured > 2 * 100 + 4
    late = crash(0, "late save", cause="time limit", waited_for_save_s=290.0)
    assert lead_s(SaveTimes(), [late]) > 2 * 290
    assert lead_s(SaveTimes(save_s=1000.0), [late]) > 2000
    assert lead_s(SaveTimes(), ()) > time_left.LEAVING_S


def test_before_a_save_was_measured_the_lead_follows_from_what_one_is_expected_to_take():
    expected = SaveTimes(step_s=4.0, expected_save_s=400.0)
    assert lead_s(expected, ()) == lead_s(SaveTimes(save_s=400.0, step_s=4.0), ())
    # No more than half of the job's time, so that one whose disk was slow for a moment trains at all.
    assert lead_s(expected, (), 7200.0) == lead_s(expected, ())
    assert lead_s(expected, (), 600.0) == 300.0
    assert lead_s(SaveTimes(save_s=2.0, expected_save_s=400.0), ()) == lead_s(SaveTimes(save_s=2.0), ())


def test_ranks_whose_first_save_may_be_slow_are_asked_as_early(scene):
    step = scene.waiting_step()
    line = {"step": 1, "kind": "start", "checkpoint/expected_seconds": 400.0, "total_steps": 90}
    (scene.run.path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    assert supervise_until(scene, step, 1200.0) == 0
    last = last_of(scene)
    assert (step.asked, last.end, last.ending.cause, last.decision) == (1, "stopped", "time limit", "requeue")


def test_ranks_whose_saves_are_slow_are_asked_before_slurm_asks(scene):
    step = scene.waiting_step()
    line = {"step": 4, "kind": "checkpoint", "checkpoint/stall_seconds": 10.0, "checkpoint/write_seconds": 300.0}
    (scene.run.path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    assert supervise_until(scene, step, 600.0) == 0
    last = last_of(scene)
    assert (last.end, last.ending.cause, last.last_step, last.decision) == ("stopped", "time limit", 7, "requeue")


def test_saves_are_read_however_far_from_the_end(tmp_path):
    save_line = {"step": 1, "kind": "checkpoint", "checkpoint/stall_seconds": 2.0, "checkpoint/write_seconds": 30.0}
    broken = [{"step": 2, "kind": "checkpoint", "checkpoint/write_seconds": value} for value in (None, "x", 1e999)]
    steps = [{"step": step, "kind": "step", "time/step_ms": 500.0} for step in range(3000)]
    lines = [json.dumps(line) for line in [save_line, *broken, *steps]]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert read_save_times(tmp_path) == SaveTimes(32.0, 0.5)
    start = json.dumps({"step": 1, "kind": "start", "checkpoint/expected_seconds": 7.0})
    (tmp_path / "metrics.jsonl").write_text("\n".join([start, *lines]))
    assert read_save_times(tmp_path) == SaveTimes(32.0, 0.5)
    (tmp_path / "metrics.jsonl").write_text("\n".join([start, *map(json.dumps, steps)]))
    assert read_save_times(tmp_path) == SaveTimes(0.0, 0.5, 7.0)
    for content in (b"", b"\xff\n", b'"kind": "checkpoint"', b'{"step": 1, "kind": "checkpoint"}\n'):
        (tmp_path / "metrics.jsonl").write_bytes(content)
        assert read_save_times(tmp_path) == SaveTimes()
    assert read_save_times(tmp_path / "none") == SaveTimes()


def test_a_controller_that_does_not_answer_leaves_what_was_known(monkeypatch):
    answers, now_s = iter([JobTime(100.0, 50.0), None]), [7.0]
    monkeypatch.setattr(time_left.time, "monotonic", lambda: now_s[0])
    left = TimeLeft(lambda: next(answers), lambda _: 5.0)
    assert left.look().left_s == 50
    now_s[0] += 40.0
    assert left.look().left_s == 10
    assert TimeLeft(lambda: None, lambda _: 5.0).look() is None


# Signals


@pytest.mark.parametrize(("cause", "number_of_terms"), [("time limit", 1), ("preemption", 2)])
def test_after_its_last_term_the_job_goes_back_before_slurm_kills_it(scene, monkeypatch, cause, number_of_terms):
    monkeypatch.setattr(watching, "_LEAST_GRACE_S", 0.05)
    scene.requests._kill_wait_s = lambda: 5.0
    monkeypatch.setattr(watching, "_SAME_TERM_S", 0.0)
    step, polls = deaf_step(scene), iter(range(10**6))
    scene.executor.reason = cause

    def poll():
        for rank in range(2):
            beat(scene.run, rank)
        if next(polls) in range(3, 3 + number_of_terms):
            scene.requests._receive(signal.SIGTERM, None)

    step._on_poll = poll
    assert scene.supervise() == 0
    assert (step.ended, scene.executor.requeued) == (1, [()])
    assert last_of(scene).ending.cause == cause


def test_one_term_at_the_begin_of_a_grace_ends_nothing(scene):
    scene.executor.reason = "preemption"
    for _ in range(3):
        # Of one and the same, which several processes hand on.
        scene.requests._receive(signal.SIGTERM, None)
    scene.requests.look()
    assert scene.requests.leave_by_s == float("inf")


# Limits that leave no time


@pytest.mark.parametrize(
    ("by_script", "limit_s", "trains"), [(True, 120, False), (True, 300, False), (True, 600, True), (False, 120, True)]
)
def test_a_limit_shorter_than_the_lead_ends_the_job_with_one_line(tmp_path, by_script, limit_s, trains):
    scene = Scene(tmp_path, signal_lead_s=300, **({"script": tmp_path / "train.sbatch"} if by_script else {}))
    scene.step(scene.status("done", 12))
    scene.executor.known_time = JobTime(limit_s, limit_s - 3.0)
    scene.requests._receive(signal.SIGUSR2, None)
    if by_script and not trains:
        assert scene.supervise() == 1
        last = last_of(scene)
        assert (last.end, last.decision, scene.executor.started) == ("preflight", "give_up", [])
        assert f"may run {limit_s} s, and its ranks are asked to save 300 s before" in last.why
        assert "raise --time" in last.why
        assert scene.executor.chain_ended
    else:
        scene.requests._received.clear()
        assert scene.supervise() == 0


def test_a_limit_is_compared_with_what_the_saves_need():
    assert too_short(JobTime(3600, 3000), 3599) == ""
    assert "3600 s" in too_short(JobTime(3600, 3000), 3600)


@pytest.mark.parametrize(
    ("steps", "cause", "minutes", "action"),
    [
        # One step is what a rank that is asked to stop at its start does.
        (1, "time limit", 1, "give_up"),
        (0, "time limit", 1, "give_up"),
        (2, "time limit", 1, "requeue"),
        (1, "preemption", 1, "requeue"),
        # Others may have taken the nodes; but who had hours and saved nothing never will.
        (0, "preemption", 10, "requeue"),
        (0, "preemption", 120, "give_up"),
        (0, "requeue", 120, "give_up"),
        (1, "preemption", 120, "requeue"),
    ],
)
def test_progress_is_judged_attempt_by_attempt(steps, cause, minutes, action):
    history = [
        attempt(n, "stopped", first=n * steps, last=(n + 1) * steps, cause=cause, ended_unix_s=100.0 + n + 60 * minutes)
        for n in range(4)
    ]
    decision = decide(history, situation(is_ending=True))
    assert decision.action == action
    if action == "give_up" and cause == "time limit":
        assert "raise --time" in decision.why
    assert decide(history[:3], situation(is_ending=True)).action == "requeue"


@pytest.mark.parametrize("crashes", [True, False])
def test_near_the_end_of_its_time_a_job_starts_nothing_that_it_could_not_save(scene, crashes):
    line = {"step": 4, "kind": "checkpoint", "checkpoint/stall_seconds": 0.0, "checkpoint/write_seconds": 120.0}
    scene.run.path.mkdir(parents=True, exist_ok=True)
    (scene.run.path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    step = scene.step(scene.status("running"))
    if crashes:
        assert supervise_until(scene, step, 300.0) == 0
    else:
        scene.executor.known_time = JobTime(HOUR_S, 300.0)
        assert scene.supervise() == 0
    assert len(scene.executor.started) == crashes
    assert (last_of(scene).decision, len(scene.executor.requeued)) == ("requeue", 1)


# Tasks of an array, and jobs that a requeueing brings back


@pytest.mark.parametrize(
    ("end", "decision", "job_id", "restarts", "stop_asked", "stays"),
    [
        ("stopped", "finish", 7, 1, True, True),
        ("stopped", "finish", 7, 1, False, True),
        # Stopped between two attempts, or cancelled while it waited.
        ("stopped", "requeue", 7, 1, True, True),
        ("stopped", "requeue", 7, 1, False, False),
        # Submitted anew, or started again by hand in the same allocation.
        ("stopped", "finish", 8, 0, True, False),
        ("stopped", "finish", 7, 0, True, False),
        # Whoever requeues a job that gave up has seen to it.
        ("crashed", "give_up", 7, 1, False, False),
    ],
)
def test_what_somebody_stopped_stays_stopped(tmp_path, end, decision, job_id, restarts, stop_asked, stays):
    history = [attempt(0, end, decision=decision)]
    assert was_ended_for_good(history, job_id, restarts, stop_asked=stop_asked) == stays
    assert not was_ended_for_good([], job_id, restarts, stop_asked=stop_asked)
    if stop_asked:
        save_request(tmp_path / "run", Request(action="stop", unix_time_s=1.0))
    scene = Scene(tmp_path)
    scene.history.write(history[0])
    scene.executor.job_id, scene.executor.restart_count = job_id, restarts
    scene.step(scene.status("done", 12))
    assert scene.supervise() == 0
    assert len(scene.executor.started) == (not stays)


# Memory, worlds, refusals


OOM = ["srun: error: n2: task 5: Out Of Memory", "srun: error: n1: task 0: Killed"]


def test_a_job_that_runs_out_of_memory_blames_no_node():
    ended = judged(notes=read_notes(OOM), seen_step=30)
    assert (ended.end, ended.ending.reason, ended.ending.node, ended.ending.step) == (
        "crashed",
        "out of host memory",
        "n2",
        30,
    )
    assert "raise --mem" in ended.ending.line
    twice = [replace(ended, attempt=number) for number in range(2)]
    assert sick_nodes(twice) == ()
    assert decide(twice[:1], situation()).action == "restart"
    # At the same step again it is no accident; where a leak grew for longer, a restart helps.
    assert decide(twice, situation()).action == "give_up"
    later = replace(twice[1], ending=replace(ended.ending, step=60), first_step=8, last_step=40)
    assert decide([twice[0], later], situation()).action == "restart"


def test_a_rank_that_refuses_without_a_word_is_tried_once_more():
    ended = judged(notes=read_notes(["srun: error: n2: tasks 4-7: Exited with exit code 2"]))
    assert (ended.ending.reason, "refused to start" in ended.ending.line) == ("error", True)
    assert decide([ended], situation()).action == "restart"
    assert decide([ended, replace(ended, attempt=1)], situation()).action == "give_up"


def test_an_error_of_the_world_is_final(scene):
    scene.step(scene.status("running"), scene.error(WorldError("rank out of range", value=9)))
    assert scene.supervise() == 1
    assert "bad world, which a restart cannot cure: rank out of range" in last_of(scene).why


def test_a_run_whose_folder_cannot_be_written_is_one_line(scene):
    scene.run.path.mkdir(parents=True)
    (scene.run.path / "job").write_text("")
    with pytest.raises(RunError, match="cannot") as caught:
        scene.supervise()
    assert "\n" not in caught.value.line
    assert scene.executor.started == []


def test_a_job_that_ends_while_its_disk_is_full_goes_back_into_the_queue(scene, monkeypatch):
    def refuse(_self):
        error = RunError("cannot write: No space left on device")
        error.reason = IO_REASON
        raise error

    monkeypatch.setattr(RunDirectory, "clear_traces", refuse)
    scene.requests._receive(signal.SIGUSR2, None)
    assert scene.supervise() == 0
    assert (scene.executor.requeued, scene.executor.started) == ([()], [])


def test_an_ending_that_cannot_be_written_does_not_end_the_job(scene, monkeypatch):
    def refuse(_self, _ending):
        raise RunError("cannot write: Read-only file system")

    monkeypatch.setattr(RunDirectory, "replace_ending", refuse)
    notes = ["srun: error: n2: task 1: Killed"]
    scene.step(scene.status("running"), notes=notes)
    scene.step(scene.status("done", 12))
    assert scene.supervise() == 0


# Jobs that Slurm is still cleaning up


def test_ranks_that_outlive_their_job_are_waited_for(tmp_path, monkeypatch):
    run = RunDirectory(tmp_path)
    run.heartbeats.mkdir()
    now_s, looks = [time.time()], []

    def sleep(seconds):
        now_s[0] += seconds
        looks.append(seconds)
        if len(looks) == 3:
            beat(run, 0, unix_time_s=now_s[0])

    monkeypatch.setattr(unfinished.time, "sleep", sleep)
    for clock in ("time", "monotonic"):
        monkeypatch.setattr(unfinished.time, clock, lambda: now_s[0])
    unfinished.wait_for_ranks(run)
    assert looks == []
    beat(run, 0, unix_time_s=now_s[0] - 300)
    unfinished.wait_for_ranks(run)
    assert looks == []
    # Of a node that lives, the next one comes within twenty seconds.
    beat(run, 0, unix_time_s=now_s[0])
    unfinished.wait_for_ranks(run)
    assert sum(looks[3:]) >= 20


def test_a_lost_task_excludes_its_own_node_alone(scene):
    lost = attempt(0, "lost_node", last=30, node="n2", reason="lost node", line="node n2 was lost")
    decision = decide([lost], situation(usable_nodes=("n1", "n3"), bad_nodes=("n2",)))
    assert decision.exclude == ("n2",)
    assert set(NODES) - set(decision.exclude) == {"n1", "n3"}
