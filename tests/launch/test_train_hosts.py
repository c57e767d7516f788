"""launch/train_hosts.sh, on hosts that are this machine, through a command in ssh's place."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from piip_scale.data.packing.pack import pack_coco
from piip_scale.demo.scenes import write_scenes

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launch" / "train_hosts.sh"
HOSTS = "127.0.0.1,localhost"


@pytest.fixture
def ssh(tmp_path):
    """What ssh does, without going anywhere: the login shell reads the words."""
    path = tmp_path / "fake_ssh"
    path.write_text('#!/bin/sh\necho "$1" >> "$0.hosts"\nshift\nexec sh -c "$*"\n')
    path.chmod(0o755)
    return path


def start(ssh, cwd, *words, **more):
    environment = os.environ | {"SSH": str(ssh), "PATIENCE_S": "2", "OMP_NUM_THREADS": "1"} | more
    return subprocess.Popen(
        ["bash", str(SCRIPT), *map(str, words)], cwd=cwd, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def end_of(process, timeout=60):
    output, errors = process.communicate(timeout=timeout)
    return process.returncode, output, errors


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--rank", "1", "a", "c.py"], "unknown option '--rank'; there are --ranks"),
        (["--ranks", "0", "a", "c.py"], "--ranks: got '0'"),
        (["--ranks"], "--ranks needs a value"),
        (["--port", "70000", "a", "c.py"], "--port: got '70000'"),
        (["--env", "A B=1", "a", "c.py"], "--env: got 'A B=1'"),
        (["a;b", "c.py"], "hosts: got 'a;b'"),
        (["-oProxyCommand=x", "c.py"], "hosts: got '-oProxyCommand=x'"),
        (["a", "none.py"], "config file not found: 'none.py'"),
        (["a"], "launch/train_hosts.sh [OPTIONS] HOST1,HOST2,... CONFIG"),
    ],
)
def test_arguments_are_checked_before_anything_starts(ssh, tmp_path, words, told):
    (tmp_path / "c.py").touch()
    code, output, errors = end_of(start(ssh, tmp_path, *words))
    assert (code, output) == (2, "")
    assert told in errors
    assert not Path(f"{ssh}.hosts").exists()


@pytest.fixture
def teller(tmp_path):
    """An interpreter that tells how it was started, then does what CONFIG says."""
    path = tmp_path / "py 'thon'"
    path.write_text(
        f"#!{sys.executable}\nimport json, os, runpy, sys\n"
        "rank = next(word for word in sys.argv if word.startswith('--node-rank=')).partition('=')[2]\n"
        "told = {'words': sys.argv[1:], 'cwd': os.getcwd(), 'x': os.environ.get('X'), 'pid': os.getpid()}\n"
        "json.dump(told, open(f'told_{rank}', 'w'))\n"
        "sys.argv[1:] = [rank]\nrunpy.run_path('c.py')\n"
    )
    path.chmod(0o755)
    return path


def told(folder, rank):
    return json.loads((folder / f"told_{rank}").read_text())


def test_words_arrive_as_they_were_given(ssh, teller, tmp_path):
    folder = tmp_path / 'it\'s $HOME `id` "here"'
    folder.mkdir()
    (folder / "c.py").write_text("")
    hostile = 'data.train_shards=it\'s "50%" $HOME `id` \\ *'
    words = ["--python", teller, "--env", "X=a 'b' $c", "--ranks", 3, f"ann@{HOSTS}", "c.py", "--set", hostile, ""]
    assert end_of(start(ssh, folder, *words)) == (0, "", "")
    for rank in (0, 1):
        found = told(folder, rank)
        assert (found["cwd"], found["x"]) == (str(folder), "a 'b' $c")
        assert found["words"][:8] == [
            *("-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={rank}", "--nproc-per-node=3"),
            *("--master-addr=127.0.0.1", "--master-port=29500", "--max-restarts=0"),
        ]
        assert found["words"][8:] == ["-m", "piip_scale.cli.main", "train", "c.py", "--set", hostile, ""]
    assert sorted(Path(f"{ssh}.hosts").read_text().split()) == ["ann@127.0.0.1", "localhost"]


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(found, seconds=30):
    deadline = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_when_one_host_fails_the_others_are_ended(ssh, teller, tmp_path):
    (tmp_path / "c.py").write_text("import sys, time\nsys.exit(7) if sys.argv[1] == '0' else time.sleep(600)\n")
    code, _, errors = end_of(start(ssh, tmp_path, "--python", teller, HOSTS, "c.py"))
    assert code == 7
    assert "127.0.0.1 ended with exit code 7" in errors
    assert not is_running(told(tmp_path, 1)["pid"])


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_nothing_is_left_when_the_script_ends(ssh, teller, tmp_path, number):
    (tmp_path / "c.py").write_text("import time\ntime.sleep(600)\n")
    process = start(ssh, tmp_path, "--python", teller, HOSTS, "c.py")
    wait_for(lambda: all((tmp_path / f"told_{rank}").exists() for rank in (0, 1)))
    time.sleep(0.5)
    pids = [told(tmp_path, rank)["pid"] for rank in (0, 1)]
    assert all(map(is_running, pids))
    process.send_signal(number)
    if number == signal.SIGINT:
        time.sleep(1)
        assert all(map(is_running, pids)), "the first Ctrl-C only asks"
        process.send_signal(number)
    process.communicate(timeout=60)
    wait_for(lambda: not any(map(is_running, pids)))


@pytest.mark.slow
def test_two_hosts_train_stop_together_and_go_on(ssh, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "cli"))
    from commands import CONFIG

    scenes = write_scenes(tmp_path / "scenes", num_train=16, num_val=6, size_px=64, seed=0)
    for split, source in (("train", scenes.train), ("val", scenes.val)):
        pack_coco(source, scenes.images, tmp_path / "shards" / split, workers=1)
    (tmp_path / "c.py").write_text(CONFIG.replace("{shards}", "shards"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run_dir = tmp_path / "it's a run"
    words = ["--python", sys.executable, "--ranks", 1, "--port", port, HOSTS, "c.py", "--run-dir", run_dir]
    words += ["--set", "train.evaluate_every_steps=0", "--set", "train.log_every_steps=1"]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    process = start(ssh, tmp_path, *words, "--set", "train.steps=2000", PYTHONPATH=path, PATIENCE_S="60")
    try:
        wait_for(
            lambda: (run_dir / "metrics.jsonl").exists() and "step_ms" in (run_dir / "metrics.jsonl").read_text(), 240
        )
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=120)
    finally:
        process.kill()
    stopped = json.loads((run_dir / "status.json").read_text())
    assert stopped["state"] == "stopped"
    last = stopped["step"] + 2
    more = ["--set", f"train.steps={last}", "--resume"]
    code, _, errors = end_of(start(ssh, tmp_path, *words, *more, PYTHONPATH=path), 240)
    assert code == 0, errors[-2000:]
    assert json.loads((run_dir / "status.json").read_text()) == {
        "state": "done",
        "step": last,
        "ending": None,
    }
