"""ZeRO changes where numbers live, not what they are: every stage against one process without it."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from ranks import FORCED_RELEASE, run_ranks, tiny_config
from tiny_task import TinyModel, TinyTask, make_batch

from piip_scale.engine.optim import set_learning_rate
from piip_scale.engine.schedule import lr_factor
from piip_scale.engine.step import LARGEST_LOSS, train_step
from piip_scale.engine.zero.setup import build_engine, build_model, gather_residents

STEPS = 5
GLOBAL_BATCH = 4


def weights_of(engine) -> dict[str, np.ndarray]:
    from deepspeed import zero

    found = {}
    for name, parameter in engine.module.named_parameters():
        with zero.GatheredParameters([parameter], enabled=engine.zero_optimization_stage() == 3):
            found[name] = parameter.detach().float().numpy().copy()
    gather_residents(engine)  # leaving the block has cut them, as training never does
    return found


def global_batches(step: int, accumulation: int, world, boxless, images: int = GLOBAL_BATCH) -> list:
    """The same images in a step for every number of ranks and of micro-batches."""
    size = images // (accumulation * world.num_ranks)
    whole = [make_batch(step * images + i, 1, boxes=(step, i) not in boxless) for i in range(images)]
    first = [(micro * world.num_ranks + world.rank) * size for micro in range(accumulation)]
    return [functools.reduce(joined, whole[start : start + size]) for start in first]


def joined(a, b):
    images = torch.cat([a.images_BHWC, b.images_BHWC])
    return replace(a, images_BHWC=images, infos=a.infos + b.infos, instances=a.instances + b.instances)


def train(
    world,
    _device,
    stage: int,
    accumulation: int,
    boxless=frozenset(),
    precision="fp32",
    nan_at=None,
    high_at=None,
    **zero,
) -> dict:
    # Layer decay and clipping are on, and each rank's loss is a mean over equally many images.
    config = tiny_config(
        data={"micro_batch_size": GLOBAL_BATCH // (accumulation * world.num_ranks)},
        optimizer={"lr": 1e-2, "layer_decay": 0.8, "clip_grad_norm": 0.5},
        zero={"stage": stage, "deepspeed": FORCED_RELEASE if stage == 3 else {}, **zero},
        train={"steps": STEPS, "gradient_accumulation": accumulation, "precision": precision},
    )
    task = TinyTask(config, world, drop=0.0)
    engine, plan = build_engine(build_model(task, 0), config, world)
    trace, step, calls = [], 0, 0
    while step < STEPS:
        set_learning_rate(engine.optimizer.param_groups, config.optimizer.lr * lr_factor(config.schedule, step, STEPS))
        batches = global_batches(step, accumulation, world, boxless)
        if nan_at == calls and world.rank == world.num_ranks - 1:
            batches = [spoiled(batch) for batch in batches]
        is_high = high_at == calls and world.rank == world.num_ranks - 1
        result = train_step(engine, batches, step, 0, world, 1e-9 if is_high else LARGEST_LOSS)
        total = result.losses["loss_score"] + result.losses["loss_box"]
        torch.distributed.all_reduce(total)
        trace.append((total.item() / world.num_ranks, result.grad_norm, result.applied))
        calls += 1
        step += result.applied
    sharded = sum(p.numel for p in plan_sizes(engine) if plan.shards(p))
    return {"trace": trace, "weights": weights_of(engine), "sharded": sharded}


def spoiled(batch):
    boxes = [type(i)(i.boxes_xyxy_px * float("nan"), i.labels, i.is_crowd) for i in batch.instances]
    return replace(batch, instances=tuple(boxes))


def plan_sizes(engine):
    from piip_scale.engine.zero.plan import measure

    return measure(engine.module, engine.module.parts()).parameters


def plain(accumulation: int = 1, boxless=frozenset(), images: int = GLOBAL_BATCH) -> dict:
    """The reference: torch alone, nothing of the engine but the schedule."""
    torch.manual_seed(0)
    config = tiny_config()
    model = TinyModel(drop=0.0)
    rules = model.parameter_rules()
    groups = [
        {"params": [p], "scale": 0.8 ** (model.num_layers + 1 - rules[n].layer_id), "weight_decay": 0.05 * (p.ndim > 1)}
        for n, p in model.named_parameters()
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999))
    world, trace = type("Alone", (), {"rank": 0, "num_ranks": 1}), []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * group["scale"] * lr_factor(config.schedule, step, STEPS)
        optimizer.zero_grad()
        total = 0.0
        for batch in global_batches(step, accumulation, world, boxless, images):
            losses = model(batch)
            loss = (losses["loss_score"] + losses["loss_box"]) / accumulation
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5).item()
        optimizer.step()
        trace.append((total, norm, True))
    return {"trace": trace, "weights": {n: p.detach().numpy() for n, p in model.named_parameters()}}


def assert_same(found: dict, expected: dict, rtol: float = 1e-5) -> None:
    assert found["trace"][0][:2] == pytest.approx(expected["trace"][0][:2], rel=1e-6)
    np.testing.assert_allclose(found["trace"], expected["trace"], rtol=1e-4)
    for name, weight in expected["weights"].items():
        np.testing.assert_allclose(found["weights"][name], weight, rtol=rtol, atol=2e-5, err_msg=name)


def every_stage(world, device):
    return {
        (stage, accumulation): train(world, device, stage, accumulation)
        for stage in (0, 1, 2, 3)
        for accumulation in (1, 2)
    }


@pytest.fixture(scope="module")
def on_two_ranks():
    return run_ranks(2, every_stage)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_train_as_torch_alone(on_two_ranks, stage, accumulation):
    expected = plain(accumulation)
    assert_same(on_two_ranks[0][stage, accumulation], expected)
    for name, weight in on_two_ranks[0][stage, accumulation]["weights"].items():
        np.testing.assert_array_equal(on_two_ranks[1][stage, accumulation]["weights"][name], weight)


def test_stage_three_really_shards_the_large_branch(on_two_ranks):
    large = sum(p.numel() for n, p in TinyModel().named_parameters() if n.startswith("large.blocks") and p.ndim > 1)
    assert on_two_ranks[0][3, 1]["sharded"] == large


def test_one_rank_trains_as_torch_alone():
    assert_same(run_ranks(1, train, 3, 1)[0], plain())


# Images 2 and 3 of a step are rank 1's: without boxes at first, in the middle, or both, while rank 0 has some.
BOXLESS = frozenset({(0, 2), (0, 3), (2, 2), (2, 3), (3, 0), (3, 1)})


def odd_steps(world, device):
    return {
        "boxless": train(world, device, 3, 1, BOXLESS),
        "boxless, accumulated": train(world, device, 3, 2, BOXLESS),
        **{f"nan at {stage}": train(world, device, stage, 1, nan_at=2) for stage in (0, 1, 2, 3)},
        **{f"high at {stage}": train(world, device, stage, 2, high_at=2) for stage in (0, 3)},
        **{f"nan at {stage}, bf16": train(world, device, stage, 1, nan_at=2, precision="bf16") for stage in (1, 3)},
        **{f"bf16 at {stage}": train(world, device, stage, 1, precision="bf16") for stage in (1, 2, 3)},
    }


@pytest.fixture(scope="module")
def oddities():
    return run_ranks(2, odd_steps)


@pytest.mark.parametrize(("name", "accumulation"), [("boxless", 1), ("boxless, accumulated", 2)])
def test_a_rank_without_boxes_neither_hangs_nor_changes_the_gradient(oddities, name, accumulation):
    assert_same(oddities[0][name], plain(accumulation, BOXLESS))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_with_nan_on_one_rank_changes_nothing_on_any(oddities, stage):
    for rank in (0, 1):
        found = oddities[rank][f"nan at {stage}"]
        assert [applied for *_, applied in found["trace"]] == [True, True, False, True, True, True]
        found["trace"].pop(2)
        assert_same(found, plain())


@pytest.mark.parametrize("stage", [0, 3])
def test_a_step_with_too_large_a_loss_on_one_rank_changes_nothing_on_any(oddities, stage):
    for rank in (0, 1):
        found = oddities[rank][f"high at {stage}"]
        assert math.isfinite(found["trace"][2][0])
        assert not found["trace"].pop(2)[2]
        assert_same(found, plain(2))


@pytest.mark.parametrize("stage", [1, 3])
def test_a_step_with_nan_in_bf16_changes_nothing(oddities, stage):
    found, clean = oddities[0][f"nan at {stage}, bf16"], oddities[0][f"bf16 at {stage}"]
    assert not found["trace"].pop(2)[2]
    assert found["trace"] == clean["trace"]


CPU = {"offload_optimizer": "cpu"}
OFFLOADED = {"1": (1, CPU), "2": (2, CPU), "3": (3, CPU), "3, parameters too": (3, CPU | {"offload_parameters": "cpu"})}


def offloaded_steps(world, device):
    with_nan = {name: train(world, device, stage, 2, nan_at=2, **zero) for name, (stage, zero) in OFFLOADED.items()}
    return with_nan | {"bf16": train(world, device, 3, 2, precision="bf16", nan_at=2, **OFFLOADED["3"][1])}


@pytest.fixture(scope="module")
def offloaded():
    return run_ranks(2, offloaded_steps)


@pytest.mark.parametrize("name", OFFLOADED)
def test_offloading_changes_no_number_and_no_nan_gets_through(offloaded, name):
    for rank in (0, 1):
        trace = offloaded[rank][name]["trace"]
        assert [applied for *_, applied in trace] == [True, True, False, True, True, True]
        trace.pop(2)
        assert_same(offloaded[rank][name], plain(2))


def test_offloading_in_bf16_follows_fp32(offloaded):
    found = offloaded[0]["bf16"]["trace"]
    assert not found.pop(2)[2]
    np.testing.assert_allclose(found, plain(2)["trace"], rtol=0.05)


def test_a_second_copy_on_every_two_of_four_ranks_changes_no_number():
    assert_same(run_ranks(4, functools.partial(train, node_partition=2), 3, 1)[0], plain())


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_follows_fp32(oddities, stage):
    found, expected = oddities[0][f"bf16 at {stage}"]["trace"], plain()["trace"]
    np.testing.assert_allclose(found, expected, rtol=0.05)
    assert found[0][0] == pytest.approx(expected[0][0], rel=0.01)
