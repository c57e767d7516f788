"""Plans against what a real engine keeps, and the laws that a plan obeys."""

from __future__ import annotations

from functools import cache, partial

import pytest
from ranks import run_ranks, tiny_config
from tiny_task import TinyTask

from piip_scale.config.loading import check_config
from piip_scale.engine.planning.knobs import with_checkpointed
from piip_scale.engine.planning.lines import change_lines, host_line, kept_blocks_line, memory_lines
from piip_scale.engine.planning.memory import GIB
from piip_scale.engine.planning.planner import Planner
from piip_scale.engine.step import train_step
from piip_scale.engine.zero.setup import build_engine
from piip_scale.tasks.detection.training_size import largest_canvas_px
from piip_scale.tasks.outline import outline_run

NETWORK = {
    "branches": [
        {"kind": "vit", "embed_dim": 256, "depth": 4, "num_heads": 4, "resolution_px": 64},
        {"kind": "vit", "embed_dim": 64, "depth": 4, "num_heads": 4, "resolution_px": 128},
    ],
    "interaction": {"num_stages": 2},
}


def detector(**sections):
    values = {"model": NETWORK, "train": {"steps": 6, "precision": "bf16"}} | sections
    return tiny_config(**values)


def new_planner(size_px=(128, 128)) -> Planner:
    return Planner(partial(outline_run, num_classes=3, size_px=size_px), 80 * GIB)


@cache
def shared_planner() -> Planner:
    return new_planner()


def planner(capacity: float = 80 * GIB) -> Planner:
    """For Mask R-CNN with two images: it knows what earlier tests rehearsed, each of which takes seconds."""
    return shared_planner().within(capacity)


def storage_bytes(tensors) -> int:
    found = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(found.values())


def kept_by_engine(world, device, precision):
    config = tiny_config(train={"steps": 2, "precision": precision})
    task = TinyTask(config, world, dim=64, depth=4)
    engine, _ = build_engine(task.build_model(), config, world)
    train_step(engine, list(task.train_batches(0, 0))[:1], 0, 0, world)
    optimizer = engine.optimizer
    moments = [
        value for state in optimizer.optimizer.state.values() for key, value in state.items() if key.startswith("exp")
    ]
    parameters = list(engine.module.parameters())
    plan = Planner(task.outline, GIB).plan(config, world.num_ranks)
    planned = {
        kind: sum(getattr(part, kind) for part in plan.parts) for kind in ("weights", "masters", "moments", "gradients")
    }
    return planned, {
        "weights": storage_bytes([p.ds_tensor for p in parameters])
        + storage_bytes([p.data for p in parameters if p.ds_persist]),
        "masters": storage_bytes(optimizer.fp32_partitioned_groups_flat),
        "moments": storage_bytes(moments),
        "gradients": storage_bytes([optimizer.grad_partitions_flat_buffer]),
    }


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.slow), "bf16"])
def test_what_is_sharded_is_what_a_real_engine_keeps_on_each_of_two_ranks(precision):
    for planned, real in run_ranks(2, kept_by_engine, precision):
        for kind, size in real.items():
            assert planned[kind] == pytest.approx(size, rel=0.02), kind


def test_more_gpus_never_need_more_memory_on_each():
    many = planner()
    totals = [many.plan(detector(), ranks).total for ranks in (2, 4, 8, 16, 48)]
    assert totals == sorted(totals, reverse=True)


def test_activations_follow_the_micro_batch_and_nothing_else_does():
    plans = {size: new_planner().plan(detector(data={"micro_batch_size": size}), 4) for size in (1, 4)}
    for one, four in zip(plans[1].parts, plans[4].parts, strict=True):
        # Weights cast for the heads, and noise for dropped paths, are no activations of images.
        assert four.activations == pytest.approx(4 * one.activations, rel=0.35)
        assert (one.weights, one.moments) == (four.weights, four.moments)


def test_knobs_come_in_order_each_after_those_before_until_it_fits():
    config = detector(data={"micro_batch_size": 4}, train={"steps": 6, "precision": "bf16", "images_per_step": 48})
    large = new_planner()
    full = large.plan(config, 2)
    assert large.within(full.total).changes(config, 2) == []
    changes = large.within(0.0).changes(config, 2)
    knobs = [change.knob for change in changes]
    assert knobs == [
        "model.branches.*.checkpoint_blocks=True, model.interaction.checkpoint_units=True",
        "data.micro_batch_size=2",
        "data.micro_batch_size=1",
        "zero.offload_optimizer='cpu'",
        "zero.offload_parameters='cpu'",
    ]
    totals = [full.total, *(change.plan.total for change in changes)]
    assert totals == sorted(totals, reverse=True)
    assert all(change.plan.images_per_step == 48 for change in changes)
    lines = change_lines(large.within(0.0).plan(config, 2), changes)
    assert "nothing here is enough" in lines[-1]
    enough = large.within(changes[1].plan.total).changes(config, 2)
    assert [change.knob for change in enough] == knobs[:2]
    assert "fits" in change_lines(large.within(changes[1].plan.total).plan(config, 2), enough)[-1]
    # The copies that saves write from need a host too.
    *_, full_host, nothing = change_lines(large.within(changes[1].plan.total).plan(config, 2), enough, 1.0)
    assert "fits, but a node's host memory is full" in full_host
    assert "nothing here is enough" in nothing


def test_more_gpus_are_told_as_another_way():
    config = detector(data={"micro_batch_size": 1})
    alone = new_planner()
    checkpointed = alone.within(0.0).changes(config, 8)[0].plan.total
    changes = alone.within(checkpointed - 1).changes(config, 2)
    assert "16 GPUs instead of 2" in [change.knob for change in changes]
    lines = change_lines(alone.within(0.0).plan(config, 2), changes)
    assert sum(line.startswith("  or 16 GPUs instead of 2, without what follows: ") for line in lines) == 1


def test_offloading_moves_bytes_off_the_gpu_and_loses_none():
    here, moved = (planner().plan(detector(zero={"offload_optimizer": place}), 2) for place in ("none", "cpu"))
    assert here.host == 0.0
    assert moved.host > 0
    here_bytes, moved_bytes = (sum(part.device for part in plan.parts) for plan in (here, moved))
    assert moved_bytes + moved.host == pytest.approx(here_bytes)


def test_the_table_adds_up():
    plan = planner().plan(detector(), 2)
    lines = memory_lines(plan)
    assert lines[-1] == f"{plan.total / GIB:.1f} GiB, which fits into 80.0"
    parts = [line.split() for line in lines[2 : 2 + len(plan.parts)]]
    assert [row[0] for row in parts] == [part.name.split()[0] for part in plan.parts]
    assert any(line.startswith("all parts") for line in lines)


@pytest.mark.parametrize(
    ("augment", "images", "expected"),
    [
        ({}, 1, (832, 1344)),
        ({}, 2, (1344, 1344)),
        ({"crop_px": (1024, 1024)}, 2, (1024, 1024)),
        ({"crop_px": (512, 4096)}, 2, (512, 1344)),
        ({"jitter_scale": (0.1, 2.0), "crop_px": (1000, 1500)}, 1, (1024, 1536)),
    ],
)
def test_the_largest_canvas_is_what_augmentation_allows(augment, images, expected):
    assert largest_canvas_px(tiny_config(data={"augment": augment}).data.augment, images) == expected


@pytest.mark.parametrize("kind", ["mask_rcnn", "faster_rcnn", "cascade_mask_rcnn", "dino"])
def test_every_detectors_heads_keep_more_of_larger_images(kind):
    heads = []
    for size_px in ((256, 256), (512, 512)):
        plan = new_planner(size_px).plan(detector(detector={"kind": kind}), 2)
        heads.append(next(part.activations for part in plan.parts if part.name == "heads"))
    # What RoIs or queries and cast weights keep stays; what follows the pixels is four times as much.
    assert heads[0] < heads[1] < 4 * heads[0]


def test_a_classifier_is_planned_too_and_its_pairs_stay_whole():
    values = {"task": "classification", "model": NETWORK, "train": {"steps": 6, "images_per_step": 48}}
    data = {"train_shards": "train", "val_shards": "val", "micro_batch_size": 4, "augment": {"mix": {}}}
    config = check_config(values | {"data": data})
    found = Planner(partial(outline_run, num_classes=10), 0.0)
    assert {part.name for part in found.plan(config, 2).parts} == {"branch 0", "branch 1", "interactions", "heads"}
    knobs = [change.knob for change in found.changes(config, 2)]
    assert "data.micro_batch_size=2" in knobs
    assert "data.micro_batch_size=1" not in knobs


def test_a_segmentor_is_planned_too():
    data = {"train_shards": "train", "val_shards": "val", "micro_batch_size": 2}
    config = check_config(
        {"task": "segmentation", "model": NETWORK, "data": data, "train": {"steps": 6, "precision": "bf16"}}
    )
    few, many = (Planner(partial(outline_run, num_classes=classes), GIB).plan(config, 2) for classes in (10, 150))
    heads = [next(part.activations for part in plan.parts if part.name == "heads") for plan in (few, many)]
    # Scores of 512 x 512 pixels twice over, for the decode head and the auxiliary one.
    assert heads[1] - heads[0] >= 140 * 2 * 512**2 * 4 * 2 * 2


def left_open(**sections):
    branches = [branch | {"checkpoint_blocks": "auto"} for branch in NETWORK["branches"]]
    return detector(model=NETWORK | {"branches": branches}, **sections)


def choices(config):
    return [branch.checkpoint_blocks for branch in config.model.branches]


def test_as_few_branches_compute_blocks_again_as_memory_allows_the_narrowest_first():
    planned = {
        again: planner().plan(with_checkpointed(detector(), again), 2).total for again in ((), (0,), (1,), (0, 1))
    }
    assert planned[()] > planned[1,] > planned[0, 1]
    for capacity, expected in ((planned[()], [False, False]), (planned[1,], [False, True]), (0.0, [True, True])):
        chosen = planner(capacity).settled(left_open(), 2)
        assert choices(chosen) == expected
        # A plan of what is left open is the plan of what would be decided.
        assert planner(capacity).plan(left_open(), 2) == planner(capacity).plan(chosen, 2)


def test_what_a_config_decides_stays():
    config = with_checkpointed(detector(), {0})
    assert planner(0.0).settled(config, 2) is config


def test_a_run_that_computes_blocks_again_without_need_is_told_so():
    needless = with_checkpointed(detector(), {0, 1})
    without = planner().without_checkpoints(needless, 2)
    assert without == planner().plan(detector(), 2)
    assert f"without checkpointed blocks {without.total / GIB:.1f} GiB, which fits" in kept_blocks_line(without, 0.2)
    assert planner(without.total - 1).without_checkpoints(needless, 2) is None
    assert planner().without_checkpoints(detector(), 2) is None


def test_host_memory_holds_what_is_offloaded_there_and_copies_of_saves():
    kept = planner().plan(detector(), 2)
    state = sum(part.masters + part.moments for part in kept.parts)
    assert kept.host_memory == pytest.approx(state)
    train = {"steps": 6, "precision": "bf16", "background_saves": False}
    moved = planner().plan(detector(zero={"offload_optimizer": "cpu"}, train=train), 2)
    assert moved.host > 0
    # Gradients are summed in one place, and the update has a copy of them.
    assert moved.host_memory == pytest.approx(moved.host + sum(part.gradients for part in moved.parts))
    assert "does not fit into" in host_line(moved, 8, moved.host_memory * 8 - 1)
    assert "which fits into" in host_line(moved, 8, moved.host_memory * 8)
    assert "which" not in host_line(moved, 8, None)
