from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from fakes import FakeStep, beat
from histories import attempt, crash
from scenes import Scene

from piip_scale.errors import DataError, HangError, RunError, SlurmError
from piip_scale.launch import supervisor, watching
from piip_scale.launch.spec import Request, save_request
from piip_scale.run.run_dir import RunDirectory, Status


@pytest.fixture
def scene(tmp_path):
    return Scene(tmp_path)


@pytest.fixture(autouse=True)
def spoken(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("piip_scale"), "propagate", True)
    caplog.set_level(logging.INFO, "piip_scale")
    return caplog


def test_a_done_run_starts_nothing(scene):
    scene.run.path.mkdir(parents=True)
    scene.run.write_status("done", 12)
    assert scene.supervise() == 0
    assert (scene.executor.started, scene.history.read()) == ([], ())


def test_every_attempt_profiles_what_was_asked_and_none_without(tmp_path):
    for steps, passed in (("10-12", ["--profile=10-12"]), ("", [])):
        folder = tmp_path / (steps or "none")
        folder.mkdir()
        scene = Scene(folder, profiled_steps=steps)
        scene.step(scene.status("done", 12), scene.saved(12), code=0)
        assert scene.supervise() == 0
        ((words, _),) = scene.executor.started
        assert [word for word in words if word.startswith("--profile")] == passed


def test_a_crash_is_told_everywhere_and_the_run_resumes(scene, spoken):
    notes = ["srun: error: n2: task 1: Killed", "srun: error: n1: task 0: Exited with exit code 1"]
    echo = scene.error(RuntimeError("gloo: connection closed"))
    scene.step(scene.status("running"), scene.saved(4), echo, notes=notes)
    scene.step(scene.status("done", 12), scene.saved(12), code=143)
    assert scene.supervise() == 0
    (first_words, _), (second_words, _) = scene.executor.started
    assert "--resume" not in first_words
    assert "--resume" in second_words
    first, second = scene.history.read()
    assert (first.ending.reason, first.ending.rank, first.ending.node, first.decision) == (
        "lost rank",
        1,
        "n2",
        "restart",
    )
    assert (first.first_step, first.last_step, first.ending.step) == (0, 4, 5)
    assert (second.end, second.first_step, second.decision) == ("done", 4, "finish")
    kept = scene.spec.run_dir / "job" / "attempt-0" / "errors"
    assert json.loads((kept / "first.json").read_text())["reason"] == "lost rank"
    assert "connection closed" in (kept / "rank_0.txt").read_text()
    told = [line for line in spoken.messages if "->" in line]
    assert [line.partition("supervise: ")[2] for line in told] == [
        "attempt 0: lost rank: rank 1 on n2 ended by a signal (Killed) before it could report why; goes on from step 4 "
        "-> restart",
        "attempt 1: the training is done -> finish",
    ]


def test_a_bug_is_given_up_with_its_line_in_the_status(scene):
    for _ in range(2):
        # The last: by another rank, which read the status before it failed and wrote it after.
        late = lambda: scene.run._write_status(Status("running", 5, None, 0))  # noqa: E731
        scene.step(scene.status("running"), scene.error(KeyError("boxes")), late)
    assert scene.supervise() == 1
    assert [one.decision for one in scene.history.read()] == ["restart", "give_up"]
    status = scene.run.status()
    assert (status.state, status.line) == ("failed", "KeyError: 'boxes'")
    assert scene.executor.chain_ended


def test_bad_data_is_given_up_at_once(scene):
    scene.step(scene.status("running"), scene.error(DataError("broken", value="a.tar")))
    assert scene.supervise() == 1
    assert len(scene.executor.started) == 1


def test_before_the_time_limit_ranks_stop_and_the_job_requeues(scene):
    step = scene.waiting_step()
    scene.requests._receive(signal.SIGUSR2, None)
    # It comes while the nodes are looked at: nothing is started any more.
    assert scene.supervise() == 0
    assert step.asked == 0
    again = Scene(scene.spec.working_dir)
    step = again.waiting_step()
    polls = iter(range(100))
    step._on_poll = lambda: _after(polls, 3, lambda: again.requests._receive(signal.SIGUSR2, None), again.run)
    assert again.supervise() == 0
    assert (step.asked, again.executor.requeued) == (1, [()])
    last = again.history.read()[-1]
    assert (last.end, last.ending.cause, last.last_step, last.decision) == ("stopped", "time limit", 7, "requeue")


def _after(polls, count, deed, run):
    for rank in range(2):
        beat(run, rank)
    if next(polls) == count:
        deed()


def test_ranks_that_do_not_listen_yet_are_not_told_yet(scene):
    step = scene.waiting_step()
    polls = iter(range(100))

    def poll():
        number = next(polls)
        if number == 0:
            scene.requests._receive(signal.SIGUSR2, None)
        if number < 10:
            beat(scene.run, 0)
            assert step.asked == 0
        else:
            beat(scene.run, 1)

    step._on_poll = poll
    assert scene.supervise() == 0
    assert step.asked == 1


@pytest.mark.parametrize(("action", "decision"), [("stop", "finish"), ("requeue", "requeue")])
def test_what_a_user_asks_for_is_done(scene, monkeypatch, action, decision):
    monkeypatch.setattr(watching, "_REQUEST_EVERY_S", 0.0)
    step = scene.waiting_step()
    polls = iter(range(100))
    request = Request(action=action, unix_time_s=1.0, user="me")
    step._on_poll = lambda: _after(polls, 3, lambda: save_request(scene.run.path, request), scene.run)
    assert scene.supervise() == 0
    last = scene.history.read()[-1]
    assert (last.end, last.decision) == ("stopped", decision)
    assert len(scene.executor.requeued) == (decision == "requeue")


def test_a_request_to_an_earlier_job_is_none(tmp_path):
    save_request(tmp_path / "run", Request(action="stop", unix_time_s=1.0))
    scene = Scene(tmp_path)
    scene.step(scene.status("done", 12))
    scene.requests.look()
    assert scene.requests.asked == ""


def test_scancel_is_no_preemption(scene):
    step = scene.waiting_step()
    polls = iter(range(100))
    scene.executor.reason = "cancel"
    step._on_poll = lambda: _after(polls, 3, lambda: scene.requests._receive(signal.SIGTERM, None), scene.run)
    assert scene.supervise() == 0
    assert scene.executor.requeued == []
    assert "cancelled by scancel; saved" in scene.history.read()[-1].why


def test_a_second_ctrl_c_ends_ranks_that_do_not_stop(scene):
    scene.run.heartbeats.mkdir(parents=True)
    polls = iter(range(100))

    def poll():
        number = next(polls)
        for rank in range(2):
            beat(scene.run, rank)
        if number in (3, 6):
            scene.requests._receive(signal.SIGINT, None)

    step = FakeStep(poll, lambda: None)
    scene.executor.steps.append(step)
    assert scene.supervise() == 0
    assert (step.asked, step.ended) == (1, 1)
    last = scene.history.read()[-1]
    assert (last.end, last.decision) == ("crashed", "finish")
    assert "ended as asked; the last checkpoint is that of step 0" in last.why


def test_where_requeueing_is_refused_the_history_says_so(scene):
    scene.executor.refusal = "requeueing is off"
    scene.step(scene.status("running"), scene.saved(4), scene.status("stopped", 4))
    with pytest.raises(SlurmError, match="off"):
        scene.supervise()
    last = scene.history.read()[-1]
    assert (last.decision, "requeueing is off" in last.why) == ("give_up", True)


def test_a_lost_node_is_replaced_by_a_spare(tmp_path):
    scene = Scene(tmp_path, nodes=("n1", "n2", "n3"), spares=1)
    scene.step(scene.status("running"), lambda: scene.executor.down_nodes.update(n2="node n2 was lost"))
    scene.step(scene.status("done", 12))
    assert scene.supervise() == 0
    assert [nodes for _, nodes in scene.executor.started] == [("n1", "n2"), ("n1", "n3")]
    assert "n2" in json.loads((scene.spec.run_dir / "job" / "bad_nodes.json").read_text())


def test_without_a_spare_the_job_requeues_without_the_lost_node(scene):
    scene.step(scene.status("running"), lambda: scene.executor.down_nodes.update(n2="node n2 was lost"))
    assert scene.supervise() == 0
    assert scene.executor.requeued == [("n2",)]


def test_a_node_that_went_while_its_job_was_stopped_is_left_out_too(scene):
    notes = ["srun: error: Node failure on n2"]
    scene.executor.reason = "requeue"
    scene.step(scene.status("running"), scene.saved(4), scene.status("stopped", 4), notes=notes)
    assert scene.supervise() == 0
    last = scene.history.read()[-1]
    assert (last.end, last.decision, scene.executor.requeued) == ("stopped", "requeue", [("n2",)])
    assert "n2" in json.loads((scene.spec.run_dir / "job" / "bad_nodes.json").read_text())


def test_a_node_that_fails_its_preflight_is_replaced_or_left_out(tmp_path):
    sick = {"memory_bytes": 0}
    spare = Scene(tmp_path, preflight=True, nodes=("n1", "n2", "n3"), spares=1)
    spare.executor.sick_nodes["n1"] = sick
    spare.step(spare.status("done", 12))
    assert spare.supervise() == 0
    assert [nodes for _, nodes in spare.executor.started] == [("n2", "n3")]
    (tmp_path / "b").mkdir()
    none = Scene(tmp_path / "b", preflight=True)
    none.executor.sick_nodes["n1"] = sick
    assert none.supervise() == 0
    assert (none.executor.started, none.executor.requeued) == ([], [("n1",)])
    last = none.history.read()[-1]
    assert (last.end, last.ending.node) == ("preflight", "n1")
    assert "0.0 GiB of memory are available" in last.why


def test_a_node_that_is_being_emptied_is_used_last(tmp_path):
    scene = Scene(tmp_path, nodes=("n1", "n2", "n3"), spares=1)
    scene.executor.drained.add("n1")
    scene.step(scene.status("done", 12))
    assert scene.supervise() == 0
    assert [nodes for _, nodes in scene.executor.started] == [("n2", "n3")]


def test_a_full_disk_of_the_run_makes_the_supervisor_wait(scene, monkeypatch):
    monkeypatch.setattr(supervisor, "_REFUSAL_PAUSE_S", 0.01)
    refusals = iter(range(3))

    def clear(run):
        if next(refusals, None) is not None:
            error = RunError("cannot write: No space left on device")
            error.reason = "input or output"
            raise error

    monkeypatch.setattr(RunDirectory, "clear_traces", clear)
    scene.step(scene.status("done", 12))
    assert scene.supervise() == 0
    assert len(scene.executor.started) == 1


def test_shards_that_no_node_can_read_end_the_job_before_it_trains(tmp_path):
    scene = Scene(tmp_path, preflight=True)
    for node in scene.executor.nodes:
        scene.executor.sick_nodes[node] = {"data_error": "shards/train holds no shards", "data_reason": "bad data"}
    assert scene.supervise() == 1
    assert scene.executor.started == []
    assert "bad data, which a restart cannot cure: shards/train" in scene.history.read()[-1].why


def test_an_attempt_whose_supervisor_died_with_it_is_closed(scene):
    scene.history.write(replace(attempt(0, None), nodes=("n1", "n9")))
    scene.executor.down_nodes["n9"] = "node n9 was lost: Slurm calls it down"
    scene.step(scene.status("done", 12))
    assert scene.supervise() == 0
    first, second = scene.history.read()
    assert (first.end, first.ending.node, first.decision) == ("lost_node", "n9", "requeue")
    assert second.attempt == 1


def test_a_job_that_dies_at_every_start_ends(scene):
    for number in range(3):
        scene.history.write(attempt(number, "cut", decision="requeue"))
    scene.history.write(attempt(3, None))
    assert scene.supervise() == 1
    assert scene.executor.started == []
    last = scene.history.read()[-1]
    assert (last.end, last.decision) == ("cut", "give_up")


def test_two_jobs_do_not_train_one_run(scene):
    scene.history.write(replace(attempt(0, None), job_id=3))
    scene.executor.running_jobs.add(3)
    with pytest.raises(RunError, match=r"job 3 is training in .*scancel 3"):
        scene.supervise()


def test_ranks_without_any_sign_are_ended_from_outside(scene, monkeypatch):
    for name in ("_SILENCE_MARGIN_S", "_STACKS_WITHIN_S", "_START_LIMIT_S", "_BEATS_EVERY_S"):
        monkeypatch.setattr(watching, name, 0.05)
    step = FakeStep(lambda: None, lambda: 1)
    scene.executor.steps += [step, FakeStep(lambda: scene.status("done", 12)() or 0, lambda: 0)]
    scene.run.heartbeats.mkdir(parents=True)
    assert scene.supervise() == 0
    first, _ = scene.history.read()
    assert (first.end, first.decision) == ("hang", "restart")
    assert "no rank gave any sign" in first.ending.line
    assert (step.stacks, step.ended) == (1, 1)


def test_a_hang_names_the_node_of_the_rank_that_was_waited_for_and_where_stacks_stay(scene):
    error = HangError(f"nothing went on; see {scene.run.stacks}")
    error.late_ranks = (1,)
    scene.run.stacks.mkdir(parents=True)
    stack = lambda: (scene.run.stacks / "rank_1.txt").write_text("in train_step")  # noqa: E731
    scene.step(scene.status("running"), stack, scene.error(error, rank=0))
    scene.step(scene.status("done", 12))
    assert scene.supervise() == 0
    first, _ = scene.history.read()
    assert (first.end, first.ending.rank, first.ending.node) == ("hang", 1, "n2")
    kept = first.ending.line.partition("see ")[2]
    assert (Path(kept) / "rank_1.txt").read_text() == "in train_step"


def test_the_cap_counts_over_jobs(scene):
    for number in range(3):
        scene.history.write(crash(number, node=f"m{number}", decision="requeue"))
    scene.step(scene.status("running"))
    assert scene.supervise() == 1
    assert "4 attempts in a row" in scene.history.read()[-1].why


def test_supervising_does_not_import_torch():
    code = (
        "import sys, piip_scale.cli.supervise, piip_scale.launch.supervisor, piip_scale.launch.slurm_executor,"
        "piip_scale.launch.preflight; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=True)
    assert done.stdout.strip() == "False"
