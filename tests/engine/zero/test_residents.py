"""Resident parameters under ZeRO-3 keep their memory from step to step, and hold what every rank's slices are."""

from __future__ import annotations

import pytest
import torch
from pyramid_task import PyramidTask, network, pyramid_config
from ranks import run_ranks

from piip_scale.engine.step import train_step
from piip_scale.engine.zero.partitions import publish
from piip_scale.engine.zero.setup import build_engine, build_model, gather_residents

# Odd numbers of elements, so that slices of two ranks are padded; frozen ones among them.
ODD = network({"frozen_blocks": 1}, {"embed_dim": 33, "num_heads": 3})
STEPS = 3


def steps(world, _device):
    config = pyramid_config(ODD, optimizer={"lr": 1e-2}, zero={"persistence_threshold": 64 * 64})
    task = PyramidTask(config, world)
    engine, _ = build_engine(build_model(task, 0), config, world)
    residents = engine.optimizer.persistent_parameters

    def train(step):
        train_step(engine, [next(iter(task.train_batches(0, step)))], step, 0, world)
        return wrong(residents, world)

    found = {"wrong": [train(step) for step in range(STEPS)]}
    addresses, cut = [parameter.data_ptr() for parameter in residents], []
    for parameter in residents:
        parameter.partition = lambda *_, **__: cut.append(1)
    found["wrong"].append(train(STEPS))
    found["moved"] = sum(a != parameter.data_ptr() for a, parameter in zip(addresses, residents, strict=True))
    found["cut"], found["frozen"] = len(cut), sum(not parameter.requires_grad for parameter in residents)
    found["own memory"] = sum(parameter.data_ptr() != parameter.ds_tensor.data_ptr() for parameter in residents)
    for parameter in residents:
        del parameter.partition
        parameter.ds_tensor.fill_(0.5 + world.rank)
    gather_residents(engine)
    found["wrong"].append(wrong(residents, world))
    publish(engine)
    found["wrong"].append(wrong(residents, world))
    found["padded"] = sum(parameter.ds_numel % world.num_ranks for parameter in residents)
    return found


def wrong(residents, world) -> int:
    """How many are not what all ranks' slices are."""
    return sum(not torch.equal(parameter.data.view(-1), whole(parameter, world)) for parameter in residents)


def whole(parameter, world) -> torch.Tensor:
    slices = [torch.empty_like(parameter.ds_tensor) for _ in range(world.num_ranks)]
    torch.distributed.all_gather(slices, parameter.ds_tensor.data)
    return torch.cat(slices)[: parameter.ds_numel]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_residents_stay_where_they_are_and_are_what_their_slices_are(num_ranks):
    for found in run_ranks(num_ranks, steps):
        assert found["wrong"] == [0] * len(found["wrong"])
        assert found["moved"] == found["cut"] == 0
        assert found["frozen"] > 0
        assert (found["own memory"] > 0) == (found["padded"] > 0) == (num_ranks > 1)
