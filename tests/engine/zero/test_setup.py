"""What building, evaluating and restoring refuse, and what they give: one process, one rank."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ranks import FORCED_RELEASE, run_ranks, tiny_config
from tiny_task import TinyModel, TinyTask

from piip_scale.engine.checkpointing import Checkpointer
from piip_scale.engine.evaluation import evaluate
from piip_scale.engine.resuming import find_checkpoint, read_state
from piip_scale.engine.step import train_step
from piip_scale.engine.zero.setup import build_engine, build_model, gather_residents
from piip_scale.errors import CheckpointError, ConfigError, ModelError
from piip_scale.world import World


def config_of(**sections):
    zero = {"deepspeed": FORCED_RELEASE} | sections.pop("zero", {})
    return tiny_config(zero=zero, **sections)


def engine_of(world, config, **task):
    engine, _ = build_engine(build_model(TinyTask(config, world, **task), 0), config, world)
    return engine


def evaluations(world, device):
    """Evaluation between training steps, with parameters really released; and the weights it was made with."""
    from deepspeed import zero

    config = config_of()
    task = TinyTask(config, world, drop=0.0)
    engine, found = engine_of(world, config, drop=0.0), []
    for step in range(4):
        train_step(engine, [next(iter(task.train_batches(0, step)))], step, 0, world)
        metrics = evaluate(engine, task, device, lambda: True).metrics
        with zero.GatheredParameters(list(engine.module.parameters())):
            weights = {name: p.detach().numpy().copy() for name, p in engine.module.named_parameters()}
        gather_residents(engine)  # leaving the block has cut them, as training never does
        found.append((metrics, weights, engine.module.training))
    return found


def test_evaluation_under_zero_3_sees_the_current_weights():
    first, second = run_ranks(2, evaluations)
    config = tiny_config()
    tasks = [TinyTask(config, World(rank, 2, rank, 2)) for rank in (0, 1)]
    for (metrics, weights, training), (others, *_) in zip(first, second, strict=True):
        model = TinyModel().eval()
        model.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
        with torch.no_grad():
            scores = [model.predict(batch)[0].scores for task in tasks for batch in task.val_batches()]
        assert metrics["mean_score"] == pytest.approx(torch.cat(scores).mean().item(), rel=1e-5)
        assert metrics == others
        assert training


def refusals(world, device, folder):
    """Each thing that must be refused, as the line that says so."""
    lines = {}

    def refused(name, kind, function):
        with pytest.raises(kind) as caught:
            function()
        lines[name] = caught.value.line

    def resumed(config, steps_per_epoch=6, **task):
        engine = engine_of(world, config, **task)
        now = Checkpointer(engine, folder, config, world, steps_per_epoch).describe(0)
        return find_checkpoint(folder).resume(engine, now)

    config = config_of()
    assert find_checkpoint(folder) is None
    first = Checkpointer(engine_of(world, config), folder, config, world, 6)
    first.save(7)
    refused("twice", CheckpointError, lambda: first.save(7))
    refused("model", CheckpointError, lambda: resumed(config, dim=16))
    refused("depth", CheckpointError, lambda: resumed(config, depth=3))
    refused("images", CheckpointError, lambda: resumed(config_of(data={"micro_batch_size": 4})))
    refused("data", CheckpointError, lambda: resumed(config, steps_per_epoch=5))
    refused("order", CheckpointError, lambda: resumed(config_of(data={"num_streams": 12})))
    refused("groups", CheckpointError, lambda: resumed(config_of(optimizer={"layer_decay": 0.5})))
    refused("precision", CheckpointError, lambda: resumed(config_of(train={"precision": "bf16"})))
    assert resumed(config) == 7

    bad_key = config_of(zero={"deepspeed": {"zero_optimization": {"no_such_key": 1}}})
    refused("raw key", ConfigError, lambda: engine_of(world, bad_key))
    engine = engine_of(world, config)
    engine.module.head.forward = lambda features, _: {"loss": features.sum()}
    batch = next(iter(TinyTask(config, world).train_batches(0, 0)))
    refused("leaf", ModelError, lambda: engine(batch))
    return lines


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    found = run_ranks(1, refusals, folder)[0]
    state = read_state(folder / "step_00000007")
    assert (state.step, state.num_ranks, state.stage) == (7, 1, 3)
    assert state.shapes["large.embed.weight"] == [32, 48]
    assert np.prod(state.shapes["large.blocks.0.up.weight"]) == 32 * 128
    return found


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("twice", "already has a checkpoint"),
        ("model", "of another shape (head.refine.weight [4, 32] against [4, 16]"),
        ("depth", "only in this model (large.blocks.2.down.bias"),
        ("images", "images a step 2, this run has 4"),
        ("data", "steps an epoch (data.train_shards) 6, this run has 5"),
        ("order", "data.num_streams 48, this run has 12"),
        ("groups", "optimizer.layer_decay"),
        ("precision", "train.precision 'fp32', this run has 'bf16'"),
        ("raw key", "unknown key zero.deepspeed.zero_optimization.no_such_key: got 1; "),
        ("leaf", "returned a dict"),
    ],
)
def test_each_refusal_is_one_line_that_names_the_difference(lines, name, said):
    assert said in lines[name]
    assert "\n" not in lines[name]


def gathers_of_a_step(world, device):
    """All-gathers in one step after the order of modules is known, and how many parameters are resident and sharded."""
    from deepspeed.comm import comm
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    config = config_of()
    task = TinyTask(config, world, drop=0.0)
    engine = engine_of(world, config, drop=0.0)
    sizes, original = [], comm.cdb.all_gather_function

    def counted(*args, output_tensor=None, **kwargs):
        output = args[0] if output_tensor is None else output_tensor
        sizes.append(output.numel())
        return original(*(() if args else (output,)), *args, **kwargs)

    for step in range(4):
        if step == 3:
            comm.cdb.all_gather_function = counted
        train_step(engine, [next(iter(task.train_batches(0, step)))], step, 0, world)
    comm.cdb.all_gather_function = original
    parameters = list(engine.module.parameters())
    resident = [p for p in parameters if p.ds_persist]
    assert all(p.ds_status == ZeroParamStatus.AVAILABLE for p in resident)
    padded = sum(-(-p.ds_numel // world.num_ranks) * world.num_ranks for p in resident)
    return sizes, padded, [p.ds_numel for p in parameters if not p.ds_persist]


def test_residents_travel_once_a_step_together_and_sharded_ones_twice():
    sizes, residents, sharded = run_ranks(2, gathers_of_a_step)[0]
    assert sizes.count(residents) == 1
    assert sizes[-1] == residents
    assert sum(sizes) - residents <= 2 * sum(sharded)
    assert sum(sizes) - residents >= sum(sharded)
