"""Compiled blocks compute what plain ones do, with a bounded number of programs, under ZeRO-3 too."""

from __future__ import annotations

import pytest
import torch
from pyramid_task import PyramidTask, network, pyramid_config
from ranks import FORCED_RELEASE, run_ranks
from tiny_configs import tiny_config
from torch._dynamo.utils import counters

from piip_scale.engine import compiling
from piip_scale.engine.compiling import compile_blocks, compile_line, compiles
from piip_scale.engine.step import train_step
from piip_scale.engine.zero.building import fill, load_whole
from piip_scale.engine.zero.setup import build_engine, build_model
from piip_scale.errors import ConfigError, KernelError
from piip_scale.models.piip import PIIP
from piip_scale.models.unit import units_of

CPU, GPU = torch.device("cpu"), torch.device("cuda")
# The first one's of both branches, then one of any size.
PROGRAMS_A_KIND = 2
SIDES_PX = (16, 24, 40)


def built(model: dict) -> PIIP:
    with torch.device("meta"):
        net = PIIP(pyramid_config(model).model)
    fill(net, {}, 0, load_whole(CPU))
    return net.train()


def gradients(net: PIIP, side_px: int) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    torch.manual_seed(side_px)
    image = torch.rand(2, 3, side_px, side_px + 8)
    features = net(image)
    net.zero_grad()
    sum(feature.square().mean() for feature in features).backward()
    return [f.detach() for f in features], {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}


# Branches, and kinds of block in them: with a window or a path to drop, or without.
CASES = {
    "all kinds": (
        network(
            {"checkpoint_blocks": True, "drop_path_rate": 0.3, "drop_path_schedule": "linear"},
            {"window_size_tokens": [0, 2]},
        ),
        4,
    ),
    "skipping samples": (network({"drop_path_rate": 0.5, "drop_path_mode": "skip"}), 2),
    # Trained ones of both branches, and frozen ones whose input has no gradient or, above an interaction, has one.
    "frozen blocks": (network({"frozen_blocks": 2, "checkpoint_blocks": True}), 4),
}
# Each takes as long as building its programs: the one with fewest is always run, and below it one that is sharded and
# checkpointed, with paths to drop.
_QUICK = "skipping samples"
_SLOW = [pytest.param(case, marks=pytest.mark.slow) for case in CASES if case != _QUICK]


@pytest.mark.parametrize("case", [_QUICK, *_SLOW])
def test_blocks_of_every_size_are_what_plain_ones_are_in_two_programs_a_kind(case):
    torch._dynamo.reset()
    counters.clear()
    model, num_kinds = CASES[case]
    plain, compiled = built(model), built(model)
    assert compile_blocks(compiled, "aot_eager") == 6
    for side_px in SIDES_PX:
        torch.testing.assert_close(gradients(compiled, side_px), gradients(plain, side_px))
    assert not counters["graph_break"]
    assert num_kinds <= counters["stats"]["unique_graphs"] <= PROGRAMS_A_KIND * num_kinds


@pytest.mark.slow  # a compiler builds some ten programs; the case above holds all but their arithmetic
def test_the_programs_of_the_real_backend_are_what_plain_blocks_are():
    torch._dynamo.reset()
    model = network({"depth": 2, "drop_path_rate": 0.3, "checkpoint_blocks": True}, {"frozen_blocks": "all"})
    plain, compiled = built(model), built(model)
    compile_blocks(compiled)
    torch.testing.assert_close(gradients(compiled, 16), gradients(plain, 16), rtol=1e-4, atol=1e-5)


def losses(world, _device, compiled: bool):
    model = network({"checkpoint_blocks": True, "drop_path_rate": 0.2})
    config = pyramid_config(model, zero={"deepspeed": FORCED_RELEASE, "persistence_threshold": 64 * 64})
    task = PyramidTask(config, world)
    engine, _ = build_engine(build_model(task, 0), config, world)
    if compiled:
        compile_blocks(engine.module, "aot_eager")
    results = [train_step(engine, [next(iter(task.train_batches(0, step)))], step, 0, world) for step in range(4)]
    return [(float(result.losses["loss"]), result.grad_norm) for result in results]


@pytest.mark.slow  # of its parts, blocks of every size and sharded ones' kept parameters are held by quick tests
def test_sharded_blocks_train_as_plain_ones():
    torch.testing.assert_close(run_ranks(2, losses, True)[0], run_ranks(2, losses, False)[0], rtol=1e-5, atol=0)


def computations(world, _device):
    config = pyramid_config(network(), train={"compile": "blocks", "steps": 1})
    engine, _ = build_engine(build_model(PyramidTask(config, world), 0), config, world)
    return [unit._computation is not None for unit in units_of(engine.module)]


def test_the_config_compiles_the_blocks_of_an_engine_and_no_interactions():
    assert sorted(run_ranks(1, computations)[0]) == [False] * 2 + [True] * 6


def train_config(**values):
    return tiny_config(train={"steps": 1, **values}).train


def test_auto_compiles_on_a_gpu_that_can_be_compiled_for(monkeypatch):
    assert not compiles(train_config(), CPU)
    assert compile_line(train_config(), CPU) == "blocks: not compiled (train.compile='auto' on a CPU)"
    monkeypatch.setattr(compiling, "_missing_tools", lambda device: [])
    assert compiles(train_config(), GPU)
    assert compile_line(train_config(), GPU).startswith("blocks: compiled")
    assert "train.deterministic" in compile_line(train_config(deterministic=True), GPU)
    assert "'off'" in compile_line(train_config(compile="off"), GPU)
    monkeypatch.setattr(compiling, "_missing_tools", lambda device: ["triton"])
    assert compile_line(train_config(), GPU) == "blocks: not compiled (train.compile='auto' without triton)"


def test_what_cannot_be_compiled_is_refused(monkeypatch):
    monkeypatch.setattr(compiling.shutil, "which", lambda name: None)
    with pytest.raises(KernelError, match="no C\\+\\+ compiler"):
        compiles(train_config(compile="blocks"), CPU)
    with pytest.raises(ConfigError, match="does not go with deterministic=True"):
        train_config(compile="blocks", deterministic=True)
