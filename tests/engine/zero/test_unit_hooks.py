"""A sharded block under ZeRO-3 is one unit: hooked once, gathered and released once in each direction."""

from __future__ import annotations

from collections import Counter

import pytest
from pyramid_task import PyramidTask, network, pyramid_config
from ranks import FORCED_RELEASE, run_ranks

from piip_scale.engine.step import train_step
from piip_scale.engine.zero.setup import build_engine, build_model
from piip_scale.models.unit import units_of

NUM_BLOCKS = 4
NUM_MATRICES = 4


class Watch:
    """What ZeRO-3's coordinator does at each module, and which parameters are gathered meanwhile."""

    def __init__(self, engine) -> None:
        self.names = {module: name for name, module in engine.module.named_modules()}
        self.calls, self.gathered, self.ahead, self.now = Counter(), Counter(), 0, None
        coordinator = engine.optimizer.parameter_offload.get_param_coordinator()
        self.watch(coordinator, "fetch_sub_module")
        self.watch(coordinator, "release_sub_module")
        for name, parameter in engine.module.named_parameters():
            parameter.known_as = name
            parameter.all_gather_coalesced = self.gathering(parameter.all_gather_coalesced)

    def watch(self, coordinator, method) -> None:
        original = getattr(coordinator, method)

        def watched(module, *args, **kwargs):
            self.now = self.names[module]
            self.calls[method, self.now] += 1
            original(module, *args, **kwargs)
            self.now = None

        setattr(coordinator, method, watched)

    def gathering(self, original):
        def gather(parameters, *args, **kwargs):
            self.gathered.update(parameter.known_as for parameter in parameters if not parameter.ds_persist)
            self.ahead += sum(not parameter.known_as.startswith(self.now or "") for parameter in parameters)
            return original(parameters, *args, **kwargs)

        return gather


def steps(world, _device):
    """Four steps with and without checkpointed blocks, the last of them watched."""
    found = {}
    for checkpointed in (False, True):
        model = network({"checkpoint_blocks": checkpointed, "drop_path_rate": 0.2})
        config = pyramid_config(model, zero={"deepspeed": FORCED_RELEASE, "persistence_threshold": 64 * 64})
        task = PyramidTask(config, world)
        engine, _ = build_engine(build_model(task, 0), config, world)
        for step in range(4):
            watch = Watch(engine) if step == 3 else None
            train_step(engine, [next(iter(task.train_batches(0, step)))], step, 0, world)
        found[checkpointed] = (watch.calls, watch.gathered, watch.ahead, hooks_of(engine.module))
        found["dicts"] = {type(module._parameters) for module in engine.module.modules()}
        found["partitions weights"] = engine.zero_optimization_partition_weights()
    return found


def hooks_of(model) -> dict[str, int]:
    """DeepSpeed's hooks on the blocks of the large branch, and on all that is inside."""
    return {
        f"{prefix}.{name}".rstrip("."): len(module._forward_pre_hooks) + len(module._forward_hooks)
        for prefix, unit in model.named_modules()
        if unit in set(units_of(model)) and ".branches.0." in prefix
        for name, module in unit.named_modules()
    }


@pytest.fixture(scope="module")
def found():
    return run_ranks(1, steps)[0]


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_sharded_block_is_fetched_and_released_once_in_each_direction(found, checkpointed):
    calls, gathered, ahead, _ = found[checkpointed]
    blocks = {f"backbone.branches.0.blocks.{index}" for index in range(NUM_BLOCKS)}
    hooked = {name for _, name in calls} - {"head"}
    assert blocks <= hooked
    assert {calls[method, name] for method in ("fetch_sub_module", "release_sub_module") for name in hooked} == {2}
    matrices = [count for name, count in gathered.items() if ".branches.0." in name]
    assert len(matrices) == NUM_BLOCKS * NUM_MATRICES
    # What is still there when the passes meet is not gathered again.
    assert set(matrices) <= {1, 2}
    assert sum(matrices) > len(matrices)
    assert ahead > 0, "nothing was prefetched"


def test_only_the_block_itself_is_hooked(found):
    hooks = found[True][3]
    blocks = {name for name in hooks if name.removeprefix("backbone.branches.0.blocks.").isdigit()}
    assert len(blocks) == NUM_BLOCKS
    assert {hooks[name] for name in blocks} == {4}
    assert {hooks[name] for name in hooks.keys() - blocks} == {0}


def test_no_module_is_told_of_a_pass(found):
    assert found["dicts"] == {dict}
    assert found["partitions weights"] is True
