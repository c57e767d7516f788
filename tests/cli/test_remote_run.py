"""Shards behind http, as a user has them: the same training, and one line for what is wrong."""

from __future__ import annotations

import json

import pytest
from commands import failed_in_one_line, piip_scale, succeeded
from sections.faulty_server import FaultyServer


def told(run_dir):
    """What each written step says that does not depend on the machine."""
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [
        {key: value for key, value in line.items() if key.startswith(("step", "loss/", "train/", "eval/", "data/"))}
        for line in lines
        if line["kind"] in ("step", "evaluation")
    ]


def test_a_training_over_a_bad_line_is_that_from_a_folder(shards, config, trained, tmp_path):
    first = {0: "503", 1: "truncate"}
    with FaultyServer(shards, lambda name, number: first.get(number)) as server:
        places = [f"--set=data.{split}_shards={server.url}/{split}" for split in ("train", "val")]
        cache = f"--set=data.cache.folder={tmp_path / 'cache'}"
        succeeded(piip_scale("train", config, "--procs", 2, "--run-dir", tmp_path / "run", *places, cache))
        # Two tries that failed and one that did not, for all ranks and their loader processes together.
        shard_requests = {name: count for name, count in server.requests.items() if name.endswith(".tar")}
    assert set(shard_requests.values()) == {3}
    assert told(tmp_path / "run") == told(trained)
    assert any("data/broken_samples" in line for line in told(trained))


@pytest.fixture
def served(shards):
    with FaultyServer(shards) as server:
        yield server


def test_a_remote_set_is_shown_and_verified(served, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert "16, 0 without objects" in succeeded(piip_scale("shards", "show", f"{served.url}/train")).stdout
    done = succeeded(piip_scale("shards", "verify", f"{served.url}/train", "--other", f"{served.url}/val"))
    assert done.stdout.endswith("0 problems\n")
    assert [path.name.rstrip("0123456789") for path in tmp_path.iterdir()] == ["piip_scale_cache_"]


def test_a_full_disk_under_the_cache_is_one_line(served, small_disk, monkeypatch):
    disk = small_disk(16 * 1024)
    monkeypatch.setenv("TMPDIR", str(disk))
    done = piip_scale("shards", "show", f"{served.url}/train")
    failed_in_one_line(done, "shard-000000.tar", str(disk), "No space left", "data.cache.folder")
    assert not list(disk.rglob("*.part"))


def test_a_set_that_is_not_there_is_one_line(served):
    failed_in_one_line(piip_scale("shards", "show", f"{served.url}/nothing"), f"{served.url}/nothing", "not there")
