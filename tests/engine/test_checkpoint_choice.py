"""``checkpoint_blocks="auto"`` on real ranks: one decision, kept by a run that resumes on as many."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from ranks import run_ranks, tiny_config
from tiny_task import TinyTask

from piip_scale.cli.train import with_layout_of
from piip_scale.config.loading import config_text, load_config
from piip_scale.config.zero import ZeroConfig
from piip_scale.engine import checkpoint_choice, layout_choice, out_of_memory
from piip_scale.engine.planning.knobs import with_checkpointed
from piip_scale.engine.planning.memory import GIB
from piip_scale.engine.planning.planner import Planner
from piip_scale.tasks.outline import outline_run
from piip_scale.world import World

BRANCHES = [
    {"kind": "vit", "embed_dim": dim, "depth": 2, "num_heads": 4, "resolution_px": size, "checkpoint_blocks": "auto"}
    for dim, size in ((256, 64), (64, 128))
]


TASK = SimpleNamespace(outline=partial(outline_run, num_classes=3, size_px=(128, 128)))


def left_open():
    model = {"branches": BRANCHES, "interaction": {"num_stages": 2}}
    return tiny_config(model=model, train={"steps": 6, "precision": "bf16"})


def decisions(world, device):
    config, task = left_open(), TASK
    plans = checkpoint_choice.planner_on(device, task, 0.0, world.ranks_per_node)
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
    return (
        smallest_decides,
        kept,
        again == first,
        settled((none, none), elsewhere)[1],
        untouched,
        layouts(world, device),
    )


def layouts(world, device):
    """Taken for one rank a node, whose network is slow; ranks of which one has no memory; with a key that is fixed."""
    apart = replace(world, ranks_per_node=1, local_rank=0)
    zero = {"strategy": "auto", "network_gbps": 0.01}

    def chosen(capacities, **keys):
        config = tiny_config(zero=zero | keys, train={"steps": 6, "precision": "bf16", "images_per_step": 16})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layout_choice, "device_bytes", lambda *_: capacities[world.rank])
            settled = layout_choice.settle_layout(config, TinyTask(config, apart), apart, device)
        return layout_choice.layout_text(settled)

    return chosen((GIB * 8, GIB * 8)), chosen((GIB * 8, 0)), chosen((GIB * 8, GIB * 8), stage=3)


def test_the_smallest_device_decides_for_all_and_a_resumed_run_keeps_it():
    for *blocks, (fast, small, fixed) in run_ranks(2, decisions):
        assert blocks == [[False, True], [False, True], True, [False, False], True]
        # Summed once a step; where nothing fits, what needs least; of what is left to it, the fastest.
        assert fast in ("stage=1", "stage=3, shard_over=1")
        assert small == "stage=3, offload_optimizer='cpu', offload_parameters='cpu'"
        assert fixed.startswith("stage=3")


def test_what_is_left_to_a_plan_stays_out_of_a_config_s_file_until_it_is_decided(tmp_path):
    config = tiny_config(zero={"strategy": "auto", "node_partition": 1})
    assert config.zero.open_keys == ("stage", "shard_over", "offload_optimizer", "offload_parameters")
    decided = config.model_copy(update={"zero": config.zero.decided(ZeroConfig(stage=2))})
    for each in (config, decided, tiny_config(zero={"stage": 1})):
        (tmp_path / "config.py").write_text(config_text(each))
        again = load_config(tmp_path / "config.py")
        assert (again, again.zero.open_keys) == (each, each.zero.open_keys)
        assert config_text(again) == config_text(each)
    assert (decided.zero.stage, decided.zero.open_keys) == (2, ())
    # What a resumed run leaves open is as it was decided, and what it says holds.
    (tmp_path / "config.py").write_text(config_text(decided))
    resumed = with_layout_of(tiny_config(zero={"strategy": "auto", "offload_optimizer": "cpu"}), tmp_path / "config.py")
    assert layout_choice.layout_text(resumed) == "stage=2, offload_optimizer='cpu'"
    assert with_layout_of(config, tmp_path / "absent.py") is config


def test_a_device_that_is_full_all_the_same_is_told_to_compute_blocks_again(monkeypatch):
    config, world = left_open(), World(num_ranks=2, ranks_per_node=2)
    kept = Planner(TASK.outline, 0.0).plan(with_checkpointed(config, ()), 2)
    monkeypatch.setattr(out_of_memory, "device_bytes", lambda *_: int(kept.total) + 1)
    error = out_of_memory.device_memory_error(TASK, config, world, torch.device("cpu"))
    assert "set model.branches.*.checkpoint_blocks=True" in str(error)
