"""Saving beside the training, on real ranks: what is written, when, and what a refusing disk does."""

from __future__ import annotations

import contextlib
import errno
import json
import threading
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from ranks import FORCED_RELEASE, run_ranks, tiny_config
from tiny_task import TinyTask, make_batch

from piip_scale.checkpoint.store import MANIFEST, CheckpointStore
from piip_scale.engine.checkpointing import Checkpointer, part_path
from piip_scale.engine.save_job import SaveJob
from piip_scale.engine.step import train_step
from piip_scale.engine.zero.setup import build_engine, build_model
from piip_scale.errors import CheckpointError

HELD_SECONDS = 1.0


class Bench:
    """An engine that has done two steps, and its checkpointer."""

    def __init__(self, world, folder, stage, **train) -> None:
        config = tiny_config(
            optimizer={"lr": 1e-2, "layer_decay": 0.8},
            zero={"stage": stage, "deepspeed": FORCED_RELEASE if stage == 3 else {}},
            train={"precision": "bf16", **train},
        )
        self.world, self.steps = world, 0
        task = TinyTask(config, world)
        self.engine, _ = build_engine(build_model(task, 0), config, world)
        self.checkpointer = Checkpointer(self.engine, Path(folder), config, world, 6)
        self.store = CheckpointStore(Path(folder), keep=2)
        self.train(2)

    def train(self, steps: int) -> None:
        for _ in range(steps):
            train_step(self.engine, [make_batch(self.steps * 2 + self.world.rank, 2)], self.steps, 0, self.world)
            self.steps += 1


@contextlib.contextmanager
def slow_disk():
    """Files are written once a training has waited for them for ``HELD_SECONDS``."""
    gate, save, wait = threading.Event(), torch.save, SaveJob.wait

    def held(content, file):
        assert gate.wait(240)
        save(content, file)

    def waiting(job, seconds):
        if not gate.is_set():
            time.sleep(HELD_SECONDS)
            gate.set()
        return wait(job, seconds)

    with mock.patch("torch.save", held), mock.patch.object(SaveJob, "wait", waiting):
        yield


def same(found, wanted) -> bool:
    if isinstance(wanted, torch.Tensor):
        return found.dtype == wanted.dtype and torch.equal(found, wanted)
    if isinstance(wanted, dict):
        return list(found) == list(wanted) and all(same(found[key], wanted[key]) for key in wanted)
    if isinstance(wanted, list | tuple):
        return len(found) == len(wanted) and all(map(same, found, wanted))
    # Objects without equality of their own have their content compared.
    return found == wanted or (type(found) is type(wanted) and vars(found) == vars(wanted))


def saving_beside_training(world, _device, folder, stage):
    bench = Bench(world, f"{folder}/checkpoints", stage)
    counter = torch.tensor([10 + world.rank])
    bench.checkpointer.add_part("counter", lambda: {"value": counter})
    bench.engine.save_checkpoint(f"{folder}/twin", tag="zero", client_state={}, save_latest=False)
    seen = {}
    with slow_disk():
        begun = time.perf_counter()
        bench.checkpointer.save(2)
        seen["stood still at most"] = time.perf_counter() - begun
        bench.train(2)
        counter += 100
        seen["while writing"] = bench.checkpointer.poll(), bench.store.latest()
        seen["first"] = bench.checkpointer.save(4)
        seen["second"] = bench.checkpointer.finish()
    checkpoint = bench.store.path(2)
    files = sorted(str(path.relative_to(f"{folder}/twin")) for path in Path(folder, "twin").rglob("*.pt"))
    load = {"map_location": "cpu", "weights_only": False}
    for name in files:
        found, wanted = torch.load(checkpoint / name, **load), torch.load(f"{folder}/twin/{name}", **load)
        found.pop("piip_scale", None)
        seen[name] = same(found, wanted)
    seen["part"] = torch.load(part_path(checkpoint, "counter", world.rank))["value"].item()
    return seen


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_a_save_holds_its_step_while_training_goes_on(tmp_path, stage):
    found = run_ranks(2, saving_beside_training, str(tmp_path), stage)
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    for rank, seen in enumerate(found):
        assert seen.pop("while writing") == (None, None)
        assert seen.pop("part") == 10 + rank
        first, second = seen.pop("first"), seen.pop("second")
        assert (first.step, first.name, second.step) == (2, "step_00000002", 4)
        # The first returned before it was written; the second waited until then.
        assert 0 < first.stall_seconds <= seen.pop("stood still at most")
        assert first.write_seconds >= HELD_SECONDS
        assert second.stall_seconds >= HELD_SECONDS
        # All else are the files that DeepSpeed writes itself: their content is the same.
        assert len(seen) == 3 + (stage == 3)
        assert all(seen.values()), seen
    assert store.steps() == [2, 4]
    names = json.loads((store.path(4) / MANIFEST).read_text())["files"].keys()
    assert {"counter/rank_00000.pt", "counter/rank_00001.pt", "training.json"} < set(names)
    for step in (2, 4):
        store.validate(store.path(step))


def refused_on_one_rank(world, _device, folder, background):
    bench = Bench(world, folder, 3, background_saves=background)
    bench.checkpointer.save(2)
    bench.checkpointer.finish()
    bench.train(1)
    refusal = OSError(errno.ENOSPC, "No space left on device")
    try:
        with mock.patch("torch.save", side_effect=refusal) if world.rank == 1 else contextlib.nullcontext():
            bench.checkpointer.save(3)
            while bench.checkpointer.poll() is None:
                pass
    except CheckpointError as error:
        bench.checkpointer.close()
        return error.line
    return None


@pytest.mark.parametrize("background", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_disk_that_refuses_one_rank_stops_all_with_its_name(tmp_path, background):
    lines = run_ranks(2, refused_on_one_rank, str(tmp_path), background)
    assert lines[0] == lines[1]
    assert f"cannot write checkpoint {tmp_path}/.saving_00000003 on rank 1: No space left on device" in lines[0]
    assert "free some space" in lines[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000002"]
