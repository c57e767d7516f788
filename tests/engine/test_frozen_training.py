"""Frozen parts of a network: never updated, without gradients and optimiser state, kept by checkpoints."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from pyramid_task import PyramidTask, network, pyramid_config
from ranks import FORCED_RELEASE, run_ranks
from test_equality import weights_of
from tiny_task import make_batch

from piip_scale.checkpoint.zero_reader import ZeroCheckpoint
from piip_scale.engine.checkpointing import Checkpointer
from piip_scale.engine.resuming import find_checkpoint
from piip_scale.engine.step import train_step
from piip_scale.engine.zero.building import fill, load_whole
from piip_scale.engine.zero.setup import build_engine, build_model, give_blanks, give_weights
from piip_scale.world import World

# Checkpointed blocks below and above the border: the reentrant kind of checkpointing would lose gradients here.
STEM = {"large": {"frozen_blocks": 2, "checkpoint_blocks": True}}
WHOLE = {"large": {"frozen_blocks": "all", "checkpoint_blocks": True}, "small": {"frozen_blocks": 1}}
CASES = {
    "stem": (STEM, 3, "fp32"),
    "whole branch": (WHOLE, 3, "fp32"),
    "stem in bf16": (STEM, 3, "bf16"),
    "stem at stage 1 in bf16": (STEM, 1, "bf16"),
}


def config_of(case: str):
    frozen, stage, precision = CASES[case]
    return pyramid_config(
        network(**frozen),
        optimizer={"lr": 1e-2},
        zero={"stage": stage, "deepspeed": FORCED_RELEASE if stage == 3 else {}},
        train={"precision": precision, "background_saves": False},
    )


def steps(engine, world, first: int, last: int) -> list[tuple[float, float]]:
    found = []
    for step in range(first, last):
        result = train_step(engine, [make_batch(step * 2 + world.rank, 1)], step, 0, world)
        loss = result.losses["loss"]
        torch.distributed.all_reduce(loss)
        found.append((loss.item() / world.num_ranks, result.grad_norm))
    return found


def trained(world, device, folder: Path) -> dict[str, dict]:
    """Four steps with a checkpoint after the second, and the last two again from there."""
    found = {}
    for name in CASES:
        config = config_of(name)

        def begin(give, config=config, path=folder / name):
            task = PyramidTask(config, world)
            engine, _ = build_engine(build_model(task, 0), config, world, give=give)
            return engine, Checkpointer(engine, path, config, world, task.num_train_batches())

        engine, checkpointer = begin(give_weights)
        start, trace = weights_of(engine), steps(engine, world, 0, 2)
        checkpointer.save(2)
        checkpointer.finish()
        trace += steps(engine, world, 2, 4)
        moments = [state["exp_avg"] for state in engine.optimizer.optimizer.state.values()]
        again, checkpointer = begin(give_blanks)
        assert find_checkpoint(folder / name).resume(again, checkpointer.describe(0)) == 2
        found[name] = {
            "start": start,
            "end": weights_of(engine),
            "trace": trace,
            "resumed": (steps(again, world, 2, 4), weights_of(again)),
            "moments": sum(moment.numel() for moment in moments),
            "gradients": [n for n, p in engine.module.named_parameters() if p.grad is not None and not p.requires_grad],
            "frozen": [n for n, p in engine.module.named_parameters() if not p.requires_grad],
        }
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("frozen")
    return folder, run_ranks(2, trained, folder)


def expected_names(case: str) -> set[str]:
    large, small = "backbone.branches.0.", "backbone.branches.1."
    if case == "whole branch":
        return {large, f"{small}embedding.", f"{small}blocks.0."}
    return {f"{large}embedding.", f"{large}blocks.0.", f"{large}blocks.1."}


@pytest.mark.parametrize("case", CASES)
def test_only_the_rest_moves_and_has_state(results, case):
    first, second = (rank[case] for rank in results[1])
    frozen = set(first["frozen"])
    assert frozen == {name for name in first["start"] if name.startswith(tuple(expected_names(case)))}
    for name, weight in first["start"].items():
        assert np.array_equal(first["end"][name], weight) == (name in frozen), name
    assert first["gradients"] == second["gradients"] == []
    trainable = sum(weight.size for name, weight in first["start"].items() if name not in frozen)
    # A rank's share of every parameter, padded to the same on all ranks.
    assert trainable / 2 <= first["moments"] <= trainable / 2 + len(first["start"]) + 2


@pytest.mark.parametrize("case", ["stem", "whole branch"])
def test_it_trains_as_torch_alone(results, case):
    model = build_model(PyramidTask(config_of(case), World()), 0)
    fill(model, {}, 0, load_whole(torch.device("cpu")))
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rules = {id(p): model.parameter_rules()[name].decays for name, p in model.named_parameters()}
    groups = [{"params": [p], "weight_decay": 0.05 * rules[id(p)]} for p in trainable]
    optimizer = torch.optim.AdamW(groups, lr=config_of(case).optimizer.lr)
    trace = []
    for step in range(2):
        optimizer.zero_grad()
        losses = [model(make_batch(step * 2 + rank, 1))["loss"] / 2 for rank in range(2)]
        torch.stack(losses).sum().backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in trainable if p.grad is not None]).item()
        trace.append((sum(loss.item() for loss in losses), norm))
        optimizer.step()
    np.testing.assert_allclose(results[1][0][case]["trace"][:2], trace, rtol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_checkpoints_keep_frozen_parts(results, case):
    folder, ranks = results
    checkpoint = ZeroCheckpoint(folder / case / "step_00000002")
    start = ranks[0][case]["start"]
    assert set(start) <= set(checkpoint)
    for name in ranks[0][case]["frozen"]:
        np.testing.assert_array_equal(checkpoint[name].float().numpy(), start[name], err_msg=name)
    for rank in ranks:
        trace, weights = rank[case]["resumed"]
        assert trace == rank[case]["trace"][2:]
        for name, weight in rank[case]["end"].items():
            np.testing.assert_array_equal(weights[name], weight, err_msg=name)
