"""A run that goes on elsewhere: on other ranks and other ZeRO stages it is the run it would have been."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ranks import FORCED_RELEASE, run_ranks, tiny_config
from resumed_run import train_to_end
from tiny_task import TinyTask, make_batch

from piip_scale.checkpoint.zero_reader import ZeroCheckpoint
from piip_scale.engine.checkpointing import Checkpointer
from piip_scale.engine.resuming import find_checkpoint
from piip_scale.engine.step import train_step
from piip_scale.engine.zero.setup import build_engine, build_model
from piip_scale.telemetry.memory import peak_memory_bytes

STEPS = 6
IMAGES = 4
# Sub-groups smaller than a group, so that flat tensors, groups and parameters are three different things. The linear
# layer that would be chosen on one rank rounds in another order than that on several, which shows in bf16.
RAW_STAGE_3 = FORCED_RELEASE["zero_optimization"] | {"sub_group_size": 500, "memory_efficient_linear": True}
VARIANTS = {
    "stage 0": (0, "fp32"),
    "stage 1": (1, "fp32"),
    "stage 1, bf16": (1, "bf16"),
    "stage 2": (2, "fp32"),
    "stage 2, bf16, offloaded": (2, "bf16"),
    "stage 3": (3, "fp32"),
    "stage 3, bf16": (3, "bf16"),
    "stage 3, offloaded": (3, "fp32"),
}
LOSS_TOLERANCE = {"fp32": 1e-6, "bf16": 1e-3}
WEIGHT_TOLERANCE = {"fp32": 2e-6, "bf16": 1e-3}


class FrozenTask(TinyTask):
    """Has parameters that are not trained, in both branches."""

    def build_model(self):
        model = super().build_model()
        for module in (model.large.blocks[0].up, model.small.embed):
            module.requires_grad_(False)
        with torch.no_grad():
            model.small.embed.bias.normal_()
        return model


def config_of(variant: str):
    stage, precision = VARIANTS[variant]
    return tiny_config(
        data={"micro_batch_size": 1},
        optimizer={"lr": 1e-2, "layer_decay": 0.8, "clip_grad_norm": 0.5},
        zero={
            "stage": stage,
            "deepspeed": {"zero_optimization": RAW_STAGE_3} if stage == 3 else {},
            "offload_optimizer": "cpu" if "offloaded" in variant else "none",
            "offload_parameters": "cpu" if "3, offloaded" in variant else "none",
        },
        train={"steps": STEPS, "images_per_step": IMAGES, "precision": precision},
    )


def go_on(world, device, variant, source, saves):
    """Trains from the newest checkpoint in a folder, or from the start, to the end.

    Args:
        saves: Folders to save into, by step.

    Returns:
        The losses and gradient norm of each step, and the settings of each optimiser group.
    """
    trace, engine = train_to_end(world, device, config_of(variant), source, saves, FrozenTask)
    return trace, settings_of(engine)


def settings_of(engine) -> list[dict]:
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    counters = [state["step"].data_ptr() for state in inner.state.values()]
    assert len(set(counters)) == len(counters) > 1
    keys = ("lr", "lr_scale", "weight_decay", "betas", "eps", "name")
    return [{key: group[key] for key in keys} for group in inner.param_groups]


def whole_runs(world, device, root):
    return {name: go_on(world, device, name, None, {2: root / name / "2", 6: root / name / "6"}) for name in VARIANTS}


def on_other_ranks(world, device, root, label, source, saves):
    """Every variant from its folder ``source``; saves into folders named after the step and ``label``."""
    found = {}
    for name in VARIANTS:
        folders = {step: root / name / f"{step}, {label}" for step in saves}
        found[name] = go_on(world, device, name, root / name / source, folders)
    return found


MOVES = [("stage 3", "stage 1"), ("stage 1", "stage 0"), ("stage 0", "stage 3"), ("stage 1, bf16", "stage 3, bf16")]


def in_other_stages(world, device, root):
    found = {}
    for old, new in MOVES:
        folders = {step: root / old / f"{step}, {new}" for step in (4, 6)}
        found[old, new] = go_on(world, device, new, root / old / "4, one rank", folders)
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def whole(root):
    return run_ranks(2, whole_runs, root, timeout_s=600)[0]


@pytest.fixture(scope="module")
def on_one(root, whole):
    return run_ranks(1, on_other_ranks, root, "one rank", "2", (2, 4, 6), timeout_s=600)[0]


def on_two_again(world, device, root):
    return on_other_ranks(world, device, root, "two ranks", "4, one rank", (4, 6)), in_other_stages(world, device, root)


@pytest.fixture(scope="module")
def back(root, on_one):
    return run_ranks(2, on_two_again, root, timeout_s=600)[0]


def content(folder) -> dict[str, torch.Tensor]:
    """Everything of a checkpoint that decides how training goes on, by parameter."""
    saved = ZeroCheckpoint(next(folder.glob("step_*")))
    found = dict(saved)
    trained = [name for name, weight in saved.weights.items() if any(part.state_keys for part in weight.parts)]
    for name in trained:
        found[f"{name}: step"] = torch.as_tensor(saved.counter(name))
        for moment in saved.moments(name):
            found[f"{name}: {moment}"] = torch.empty(found[name].numel())
            saved.copy_slice(name, 0, found[f"{name}: {moment}"], moment)
    assert sum("exp_avg_sq" in name for name in found) > 20
    return found


def assert_same_content(folder, expected, tolerance=0.0):
    found, wanted = content(folder), content(expected)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.allclose(found[name], value, rtol=tolerance, atol=tolerance), name


def assert_goes_on(found, whole, first, precision):
    trace, settings = found
    assert len(trace) == STEPS - first
    for here, there in zip(trace, whole[0][first:], strict=True):
        assert here == pytest.approx(there, rel=LOSS_TOLERANCE[precision])
    assert settings == whole[1]


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_rank_goes_on_where_two_were(root, whole, on_one, variant):
    folder, precision = root / variant, VARIANTS[variant][1]
    assert_same_content(folder / "2, one rank", folder / "2")
    assert_goes_on(on_one[variant], whole[variant], 2, precision)
    assert_same_content(folder / "6, one rank", folder / "6", WEIGHT_TOLERANCE[precision])


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_ranks_go_on_where_one_was(root, whole, back, variant):
    folder, precision = root / variant, VARIANTS[variant][1]
    assert_same_content(folder / "4, two ranks", folder / "4, one rank")
    assert_goes_on(back[0][variant], whole[variant], 4, precision)
    assert_same_content(folder / "6, two ranks", folder / "6", WEIGHT_TOLERANCE[precision])


@pytest.mark.parametrize("move", MOVES)
def test_a_run_goes_on_in_another_zero_stage(root, whole, back, move):
    old, new = move
    assert_same_content(root / old / f"4, {new}", root / old / "4, one rank")
    # In bf16 the stages round gradients differently, resumed or not.
    if VARIANTS[new][1] == "fp32":
        assert_goes_on(back[1][move], whole[old], 4, "fp32")
        assert_same_content(root / old / f"6, {new}", root / old / "6", WEIGHT_TOLERANCE["fp32"])


@pytest.mark.slow
def test_four_ranks_go_on_where_two_were_and_two_where_four_were(root, whole):
    on_four = run_ranks(4, on_other_ranks, root, "four ranks", "2", (2, 4, 6))[0]
    on_two = run_ranks(2, on_other_ranks, root, "two after four", "4, four ranks", (4, 6))[0]
    for variant, (_, precision) in VARIANTS.items():
        folder = root / variant
        assert_same_content(folder / "2, four ranks", folder / "2")
        assert_same_content(folder / "4, two after four", folder / "4, four ranks")
        assert_goes_on(on_four[variant], whole[variant], 2, precision)
        assert_goes_on(on_two[variant], whole[variant], 4, precision)
        for label in ("four ranks", "two after four"):
            assert_same_content(folder / f"6, {label}", folder / "6", WEIGHT_TOLERANCE[precision])


def saved_large(world, device, folder):
    engine, checkpointer = large_engine(world, folder)
    for step in range(2):
        train_step(engine, [make_batch(step * 2 + world.rank, 1)], step, 0, world)
    checkpointer.save(2)
    checkpointer.finish()


def large_engine(world, folder):
    config = tiny_config(data={"micro_batch_size": 2 // world.num_ranks}, optimizer={"lr": 1e-4})
    engine, _ = build_engine(build_model(TinyTask(config, world, dim=1536, depth=4), 0), config, world)
    return engine, Checkpointer(engine, folder, config, world, 6)


def memory_of_resuming(world, device, folder) -> tuple[int, int]:
    """Bytes that resuming took at its peak, and elements trained."""
    engine, checkpointer = large_engine(world, folder)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    before = peak_memory_bytes(device)
    find_checkpoint(folder).resume(engine, checkpointer.describe(0))
    return peak_memory_bytes(device) - before, sum(p.ds_numel for p in engine.module.parameters())


@pytest.mark.slow
def test_resuming_takes_no_memory_but_the_moments_and_the_pages_that_are_mapped(tmp_path):
    run_ranks(2, saved_large, tmp_path)
    taken, numel = run_ranks(1, memory_of_resuming, tmp_path)[0]
    assert 8 * numel > 500 << 20
    assert taken < 8 * numel + (192 << 20)


def test_frozen_parameters_come_from_the_checkpoint(root, back):
    first, last = (content(root / "stage 3" / name) for name in ("2", "6, two ranks"))
    for name in ("large.blocks.0.up.weight", "small.embed.bias"):
        assert f"{name}: step" not in first
        assert torch.equal(first[name], last[name])
        assert first[name].std() > 0
