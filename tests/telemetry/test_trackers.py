"""W&B and MLflow beside a run's own files: told once, by one thread, and never the end of a training."""

from __future__ import annotations

import io
import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time

import pytest
from test_boards import evaluation
from test_telemetry import WRITER, record

from piip_scale.config.loading import changed_keys
from piip_scale.errors import ConfigError
from piip_scale.telemetry import SaveRecord, Telemetry, trackers
from piip_scale.telemetry.trackers import TrackedRun, read_identities, require_trackers


class Told:
    """A stand-in for a tracker; what all of its objects were told."""

    calls: list = []
    opened: list[TrackedRun] = []

    def __init__(self, run):
        self.opened.append(run)
        self.identity = run.identity or "a1b2"

    def scalars(self, step, values):
        self.calls.append((step, dict(values)))

    def pictures(self, step, pictures):
        self.calls.append((step, dict(pictures)))

    def close(self, state):
        self.calls.append(state)

    @classmethod
    def abandon(cls):
        cls.calls.append("abandoned")


@pytest.fixture
def told(monkeypatch):
    kind = type("OneTold", (Told,), {"calls": [], "opened": []})
    monkeypatch.setattr(trackers, "TRACKERS", {"wandb": kind})
    return kind


@pytest.fixture
def warnings(monkeypatch):
    lines = []
    logger = type("Logger", (), {"warning": lambda _, text, *words: lines.append(text % words)})()
    monkeypatch.setattr(trackers, "get_logger", lambda name: logger)
    return lines


def train(folder, first, last, state="done", names=("wandb",), settings=None):
    """Steps, an evaluation after the last, and a save that became visible a step late."""
    telemetry = Telemetry(folder, total_steps=8, first_step=first, show_progress=False, stream=io.StringIO())
    telemetry.track(names, TrackedRun(folder, "digits", settings or {}, {"command": "train x.py"}))
    for step in range(first + 1, last + 1):
        telemetry.step(record(step))
    telemetry.save(SaveRecord(last - 1, f"step_{last - 1:08d}", 0.25, 2.5, 1 << 30))
    telemetry.evaluation(last, evaluation(last / 10))
    telemetry.close(state)


def test_what_a_run_tells_reaches_a_tracker_once_also_after_a_kill(told, tmp_path):
    train(tmp_path, 0, 4, "stopped", settings={"optimizer.lr": 0.1})
    steps = [call for call in told.calls if isinstance(call, tuple) and "loss/total" in call[1]]
    assert [step for step, _ in steps] == [1, 2, 3, 4]
    assert steps[0][1]["0_overview/images_per_second"] == 8.0
    *_, scores, pictures, state = told.calls
    assert scores == (4, {"0_overview/box_ap": 0.4, "eval/box_ap": 0.4, "per_class/box_ap50/a/b": 0.4})
    assert [*pictures[1]] == ["truth_beside_found/image 7"]
    assert state == "stopped"
    assert "abandoned" not in told.calls
    assert json.loads((tmp_path / "trackers.json").read_text()) == {"wandb": "a1b2"}
    # From its checkpoint of step 2 on: what is done again was told.
    train(tmp_path, 2, 6)
    steps = [call[0] for call in told.calls if isinstance(call, tuple) and "loss/total" in call[1]]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert [run.identity for run in told.opened] == [None, "a1b2"]
    assert told.opened[0].settings == {"optimizer.lr": 0.1}
    assert told.opened[0].texts == {"command": "train x.py"}


@pytest.mark.parametrize("place", ["__init__", "scalars", "pictures", "close"])
def test_a_tracker_that_fails_is_one_line_and_the_run_goes_on(told, warnings, tmp_path, monkeypatch, place):
    def fails(*_):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(told, place, fails)
    train(tmp_path, 0, 4)
    assert warnings == [
        "wandb failed: ConnectionError: no route; the run goes on without it, its own files have everything"
    ]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "step"] == [1, 2, 3, 4]
    assert told.calls[-1] == "abandoned"


def test_a_tracker_that_hangs_holds_up_nothing(told, warnings, tmp_path, monkeypatch):
    answers = threading.Event()
    monkeypatch.setattr(told, "scalars", lambda *_: answers.wait(60))
    monkeypatch.setattr(trackers, "_LONGEST_CLOSING_S", {"done": 0.05})
    train(tmp_path, 0, 4)
    assert warnings == [
        "wandb has not taken everything after 0 s; the run goes on without it, its own files have everything"
    ]
    assert told.calls == ["abandoned"]
    monkeypatch.setattr(trackers, "_MOST_WAITING", 3)
    train(tmp_path, 4, 8)
    assert "wandb takes too long; the run goes on without it" in warnings[1]
    answers.set()


def test_one_that_is_not_installed_is_told_before_anything_starts(monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    require_trackers(())
    with pytest.raises(ConfigError, match=r"telemetry.trackers: got 'mlflow'; .* installed; pip install mlflow, or"):
        require_trackers(("mlflow",))


def test_identities_that_cannot_be_read_are_none(tmp_path):
    path = tmp_path / "trackers.json"
    assert read_identities(path) == {}
    for text in ("{", "[]", '"a"'):
        path.write_text(text)
        assert read_identities(path) == {}


def test_weights_and_biases_has_the_run_without_a_network(tmp_path, monkeypatch, patience, warnings):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    train(tmp_path, 0, 4, "stopped", settings={"optimizer.lr": 0.1})
    # W&B names a process's folder by the second in which it begins.
    began_s = int(time.time())
    while int(time.time()) == began_s:
        time.sleep(0.05)
    train(tmp_path, 2, 6)
    assert warnings == []
    identity = read_identities(tmp_path / "trackers.json")["wandb"]
    history, configs = read_wandb(tmp_path, identity)
    assert [row["step"] for row in history if "loss/total" in row] == [1, 2, 3, 4, 5, 6]
    assert [row["eval/box_ap"] for row in history if "eval/box_ap" in row] == [0.4, 0.6]
    widths = [value for row in history for key, value in row.items() if key == "truth_beside_found/image 7/width"]
    assert widths == [40, 40]
    assert configs["optimizer.lr"] == 0.1


def read_wandb(folder, identity):
    """History and config of what all processes of an offline run have left."""
    from wandb.proto import wandb_internal_pb2

    history, configs = [], {}
    for path in sorted((folder / "wandb").glob("offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        assert path.stem == f"run-{identity}"
        for data in logged(path.read_bytes()):
            found = wandb_internal_pb2.Record.FromString(data)
            for item in found.run.config.update:
                configs[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
            items = found.history.item
            if items:
                history.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return history, configs


def logged(content):
    """The records of a log as LevelDB writes them, behind W&B's seven bytes: W&B itself reads them in Go alone."""
    place, record_so_far = 7, b""
    while place + 7 <= len(content):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, length, part = struct.unpack_from("<IHB", content, place)
        record_so_far += content[place + 7 : place + 7 + length]
        place += 7 + length
        # A whole record, or the last part of one.
        if part in (1, 4):
            yield record_so_far
            record_so_far = b""


def test_weights_and_biases_without_a_network_holds_up_neither_the_run_nor_its_end(tmp_path):
    pytest.importorskip("wandb")
    with socket.socket() as server:
        # Takes what is sent, and never answers.
        server.bind(("127.0.0.1", 0))
        server.listen()
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        environment = os.environ | {"WANDB_BASE_URL": address, "WANDB_API_KEY": "0" * 40, "WANDB_MODE": "online"}
        command = [sys.executable, WRITER, tmp_path, "3", "wandb"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0
    told = [line for line in done.stderr.splitlines() if not line.startswith(("step ", "a message"))]
    rest = "the run goes on without it, its own files have everything"
    assert told == [f"wandb has not taken everything after 15 s; {rest}"]


@pytest.fixture
def patience(monkeypatch):
    """Its database is made in 20 s where other tests run."""
    monkeypatch.setattr(trackers, "_LONGEST_CLOSING_S", dict.fromkeys(("done", "stopped"), 200.0))


def test_mlflow_has_the_run_in_its_directory(tmp_path, monkeypatch, patience, warnings):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    train(tmp_path, 0, 4, "stopped", names=("mlflow",), settings={"optimizer.lr": 0.1})
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    identity = read_identities(tmp_path / "trackers.json")["mlflow"]
    assert client.get_run(identity).info.status == "KILLED"
    train(tmp_path, 2, 6, names=("mlflow",))
    assert warnings == []
    run = client.get_run(identity)
    assert (run.info.status, run.info.run_name) == ("FINISHED", tmp_path.name)
    assert run.data.params == {"optimizer.lr": "0.1"}
    assert [one.step for one in client.get_metric_history(identity, "loss/total")] == [1, 2, 3, 4, 5, 6]
    assert [one.value for one in client.get_metric_history(identity, "eval/box_ap")] == [0.4, 0.6]
    assert [one.path for one in client.list_artifacts(identity, "pictures")] == [
        "pictures/step_00000004",
        "pictures/step_00000006",
    ]
    assert len(list((tmp_path / "mlflow_files").rglob("step_*/*.jpg"))) == 2


def test_settings_are_what_was_changed():
    changed = changed_keys(["optimizer.lr=1e-3", "model.branches.0.depth=2", "task=x y", "optimizer.lr=2e-3"])
    assert changed == {"optimizer.lr": 2e-3, "model.branches.0.depth": 2, "task": "x y"}
