import logging
import os
import signal
import threading
import time

import pytest
from ranks import tiny_config

from piip_scale.engine import local_launch, worker
from piip_scale.engine.local_launch import launch_local
from piip_scale.engine.stop import StopFlag
from piip_scale.errors import Interrupted, LostRankError
from piip_scale.run.run_dir import RunDirectory


@pytest.fixture
def quiet_signals(monkeypatch):
    """The test's own process keeps its signals and its logging."""
    monkeypatch.setattr(StopFlag, "install", lambda self: None)
    monkeypatch.setattr(worker, "configure_logging", lambda rank: None)
    monkeypatch.setattr(logging.getLogger("piip_scale"), "propagate", True)


def test_a_second_ctrl_c_is_one_line_and_exit_code_130(tmp_path, monkeypatch, caplog, quiet_signals):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(worker.Session, "train", interrupted)
    run = RunDirectory(tmp_path)
    assert worker.train_worker(tiny_config(), "config = 1\n", run, lambda *_: None) == 130
    assert [record.message for record in caplog.records] == [
        "piip-scale: error: ended by a second Ctrl-C before it could save; "
        "continue from its last checkpoint with --resume"
    ]
    assert run.status().state == "failed"
    assert "in interrupted" in (run.errors / "rank_0.txt").read_text()


def test_a_second_ctrl_c_ends_ranks_that_do_not_listen_and_is_no_success(tmp_path):
    run, begun, asked = RunDirectory(tmp_path / "run"), tmp_path / "begun", tmp_path / "asked"
    run.open("config = 1\n", resume=False)
    run.write_status("running", 3)

    def impatient():
        # Signals that come before the first was seen are one.
        for seen in (begun, asked):
            while not seen.exists():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)

    user = threading.Thread(target=impatient)
    user.start()
    with pytest.raises(Interrupted, match="second Ctrl-C") as caught:
        launch_local(
            1, ["sh", "-c", f"trap 'touch {asked}' INT; touch {begun}; while :; do sleep 60 & wait; done"], run
        )
    user.join()
    assert caught.value.exit_code == 130
    assert (run.status().state, run.status().step) == ("failed", 3)


@pytest.mark.parametrize(("said", "threads"), [(None, "3"), ("5", "5")])
def test_ranks_share_the_cores_unless_the_environment_says(tmp_path, monkeypatch, said, threads):
    monkeypatch.setattr(local_launch, "usable_cores", lambda: 6)
    monkeypatch.delenv("OMP_NUM_THREADS")
    if said:
        monkeypatch.setenv("OMP_NUM_THREADS", said)
    run = RunDirectory(tmp_path / "run")
    run.open("config = 1\n", resume=False)
    assert launch_local(2, ["sh", "-c", f"echo $OMP_NUM_THREADS > {tmp_path}/$RANK"], run) == 0
    assert [(tmp_path / str(rank)).read_text().strip() for rank in (0, 1)] == [threads] * 2


def test_what_asks_to_stop_while_ranks_start_is_passed_on_to_them(tmp_path, monkeypatch):
    run, begun = RunDirectory(tmp_path / "run"), local_launch._start
    run.open("config = 1\n", resume=False)

    def start(command, environment):
        process = begun(command, environment)
        while not (tmp_path / f"listens{environment['RANK']}").exists():
            time.sleep(0.01)
        if environment["RANK"] == "0":
            os.kill(os.getpid(), signal.SIGINT)
        return process

    monkeypatch.setattr(local_launch, "_start", start)
    listens = f"trap 'exit 130' INT; touch {tmp_path}/listens$RANK; while :; do sleep 0.05; done"
    assert launch_local(2, ["sh", "-c", listens], run) == 130


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR2])
@pytest.mark.parametrize("main", ["listens", "cannot listen", "waits for the other"])
def test_what_asks_ranks_to_stop_before_they_listen_is_no_failure_and_said_once(tmp_path, monkeypatch, number, main):
    """As Python's own end does it: by the signal where nothing is imported yet, by exit code 130 a little later."""
    run, begun = RunDirectory(tmp_path / "run"), local_launch._start
    run.open("config = 1\n", resume=False)
    run.write_status("running", 0)
    name = number.name.removeprefix("SIG")
    trap = {"listens": "trap 'exit 130' ", "cannot listen": "trap - ", "waits for the other": "trap '' "}[main] + name

    def start(command, environment):
        process = begun(command, environment)
        while not (tmp_path / f"begun{environment['RANK']}").exists():
            time.sleep(0.01)
        if environment["RANK"] == "1":
            os.kill(os.getpid(), number)
        return process

    monkeypatch.setattr(local_launch, "_start", start)
    ranks = f"[ $RANK = 0 ] && {trap}; touch {tmp_path}/begun$RANK; exec 2>&-; while :; do sleep 0.05; done"
    if main == "listens":
        assert launch_local(2, ["sh", "-c", ranks], run, grace_s=240.0) == 130
    else:
        with pytest.raises(Interrupted, match="stopped as asked before rank 0 could say so") as caught:
            launch_local(2, ["sh", "-c", ranks], run, grace_s=0.0)
        assert caught.value.exit_code == 130
        assert run.status().ending.reason == "interrupted"
    assert run.first_error() is None


@pytest.mark.parametrize(("told", "reason"), [("gloo: connection closed", "lost rank"), ("a bug", "exception")])
def test_a_killed_rank_is_the_cause_of_the_contact_that_another_has_lost_and_told_of(
    tmp_path, monkeypatch, told, reason
):
    run, begun = RunDirectory(tmp_path / "run"), local_launch._start
    run.open("config = 1\n", resume=False)
    run.write_status("running", 4)

    def start(command, environment):
        if environment["RANK"] == "1":
            run.record_error(0, RuntimeError(told), step=5)
        return begun(command, environment)

    monkeypatch.setattr(local_launch, "_start", start)
    ends = ["sh", "-c", 'test "$RANK" = 1 && kill -9 $$; sleep 600']
    if reason == "lost rank":
        with pytest.raises(LostRankError, match="rank 1 was killed by SIGKILL"):
            launch_local(2, ends, run, grace_s=0.0)
    else:
        assert launch_local(2, ends, run, grace_s=0.0) == 1
    assert run.first_error().reason == run.status().ending.reason == reason
    assert run.status().step == 5
