"""``checkpoint_blocks="auto"`` on real ranks: one decision, kept by a run that resumes on as many."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from ranks import run_ranks, tiny_config

from piip_scale.engine import checkpoint_choice, out_of_memory
from piip_scale.engine.planning.knobs import with_checkpointed
from piip_scale.engine.planning.planner import Planner
from piip_scale.tasks.outline import outline_run
from piip_scale.world import World

BRANCHES = [
    {"kind": "vit", "embed_dim": dim, "depth": 4, "num_heads": 4, "resolution_px": size, "checkpoint_blocks": "auto"}
    for dim, size in ((256, 64), (64, 128))
]


TASK = SimpleNamespace(outline=partial(outline_run, num_classes=3, size_px=(128, 128)))


def left_open():
    model = {"branches": BRANCHES, "interaction": {"num_stages": 2}}
    return tiny_config(model=model, train={"steps": 6, "precision": "bf16"})


def decisions(world, device):
    config, task = left_open(), TASK
    plans = Planner(task.outline, 0.0)
    one, none = (int(plans.plan(with_checkpointed(config, again), world.num_ranks).total) + 1 for again in ((1,), ()))

    def settled(capacities, found=None):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checkpoint_choice, "device_bytes", lambda *_: capacities[world.rank])
            result = checkpoint_choice.settle_checkpointing(config, task, world, device, found)
        return result, [branch.checkpoint_blocks for branch in result.model.branches]

    first, smallest_decides = settled((none, one))
    saved = first.model_dump(mode="json")
    here, elsewhere = (
        SimpleNamespace(state=SimpleNamespace(num_ranks=ranks, config=saved)) for ranks in (world.num_ranks, 8)
    )
    again, kept = settled((0, 0), here)
    untouched = checkpoint_choice.settle_checkpointing(first, task, world, device, None) is first
    return smallest_decides, kept, again == first, settled((none, none), elsewhere)[1], untouched


def test_the_smallest_device_decides_for_all_and_a_resumed_run_keeps_it():
    for found in run_ranks(2, decisions):
        assert found == ([False, True], [False, True], True, [False, False], True)


def test_a_device_that_is_full_all_the_same_is_told_to_compute_blocks_again(monkeypatch):
    config, world = left_open(), World(num_ranks=2, ranks_per_node=2)
    kept = Planner(TASK.outline, 0.0).plan(with_checkpointed(config, ()), 2)
    monkeypatch.setattr(out_of_memory, "device_bytes", lambda *_: int(kept.total) + 1)
    error = out_of_memory.device_memory_error(TASK, config, world, torch.device("cpu"))
    assert "set checkpoint_blocks=True in every branch" in str(error)
