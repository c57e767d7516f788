"""What a first save is expected to take, against the save itself."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch
from pyramid_task import PyramidTask, network, pyramid_config
from ranks import run_ranks
from tiny_task import make_batch

from piip_scale.checkpoint.manifest import num_bytes
from piip_scale.engine import first_save
from piip_scale.engine.checkpointing import Checkpointer
from piip_scale.engine.ema import build_average
from piip_scale.engine.first_save import FirstSave, foresee_first_save
from piip_scale.engine.step import train_step
from piip_scale.engine.zero.setup import build_engine, build_model

CASES = [(1, "bf16"), (1, "fp32"), (3, "bf16")]
WIDE = {"embed_dim": 256, "frozen_blocks": 2}


def foreseen_and_saved(world, device, root: Path):
    """For each case what was expected, what where the disk refused, the files' bytes, and what lies there."""
    found = {}
    for stage, precision in CASES:
        folder = root / f"{stage}, {precision}"
        train = {"precision": precision, "ema_decay": 0.5, "background_saves": False}
        config = pyramid_config(network(large=WIDE), data={"micro_batch_size": 1}, zero={"stage": stage}, train=train)
        engine, _ = build_engine(build_model(PyramidTask(config, world), 0), config, world)
        saver = Checkpointer(engine, folder, config, world, 6)
        build_average(engine, config.train, saver, None)
        expected = foresee_first_save(engine, folder, stage, averaged=True)
        with mock.patch.object(first_save, "_write_seconds", side_effect=OSError("read-only file system")):
            refused = foresee_first_save(engine, folder, stage, averaged=True)
        train_step(engine, [make_batch(world.rank, 1)], 0, 0, world)
        saver.save(1)
        saver.finish()
        torch.distributed.barrier()
        left = sorted(path.name for path in folder.iterdir())
        found[stage, precision] = expected, refused, num_bytes(folder / "step_00000001"), left
    return found


def test_a_first_save_is_as_large_as_was_foreseen_and_the_probe_leaves_nothing(tmp_path):
    ranks = run_ranks(2, foreseen_and_saved, tmp_path)
    for case, (expected, refused, saved_bytes, left) in ranks[0].items():
        # Files of tensors have headers of their own.
        assert 0.97 * saved_bytes < expected.num_bytes < saved_bytes, case
        assert expected.seconds > 0
        assert left == ["latest", "step_00000001"]
        # The lead is every rank's, as slow as the slowest.
        assert ranks[1][case][0] == expected
        assert refused == FirstSave(expected.num_bytes, 0.0)


@pytest.mark.parametrize(("num_bytes", "share"), [(3 << 20, 1.0), (256 << 20, 4.0)])
def test_the_time_of_a_part_counts_for_the_whole_share(tmp_path, monkeypatch, num_bytes, share):
    written = []
    monkeypatch.setattr(first_save, "_checkpoint_bytes", lambda *_, **__: num_bytes)
    monkeypatch.setattr(first_save, "_write_seconds", lambda _, size: written.append(size) or 2.0)
    monkeypatch.setattr(first_save.dist, "all_reduce", lambda *_: None)
    engine = type("Engine", (), {"module": None, "device": "cpu"})()
    found = foresee_first_save(engine, tmp_path, 0, averaged=False)
    assert found == FirstSave(num_bytes, 2.0 * share)
    assert written == [num_bytes / share]
