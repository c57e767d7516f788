"""What two ranks see of a step together: norms by part, gammas, who is slow, what pads."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from pyramid_task import PyramidTask, pyramid_config
from ranks import run_ranks, tiny_config
from tiny_task import TinyModel, TinyTask, make_batch

from piip_scale.engine.branch_watch import BranchWatch, read
from piip_scale.engine.collective import mean_over_ranks
from piip_scale.engine.interval import Interval
from piip_scale.engine.step import train_step
from piip_scale.engine.trainer import StepReport
from piip_scale.engine.zero.setup import build_engine, build_model
from piip_scale.telemetry.records import RankPace

STEPS = 2
STILL_S = (0.75, 0.25)
CLIP = 1e-3


def batches_of(rank, step):
    """Half of each image pads it."""
    made = make_batch(2 * step + rank, 2)
    return [replace(made, infos=tuple(replace(info, size_px=(8, 16)) for info in made.infos))]


def interval_of_two(world, device):
    sections = {"optimizer": {"clip_grad_norm": CLIP, "lr": 1e-12}, "zero": {"stage": 3}}
    config = tiny_config(**sections)
    engine, _ = build_engine(build_model(TinyTask(config, world, drop=0.0), 0), config, world)
    watch = BranchWatch(engine, engine.module.parts())
    interval = Interval(world, device, ["n0", "n1"], CLIP, watch)
    for step in range(STEPS):
        result = train_step(engine, batches_of(world.rank, step), step, 0, world)
        # As if the first rank waited for the second.
        timed = replace(result, message_seconds=STILL_S[world.rank])
        report = StepReport(step + 1, timed, 0.0, seconds=1.0, wait_seconds=0.125)
        interval.add(report)
    own = interval.own(report)
    means = mean_over_ranks({"loss": 1.0, **own}, device)
    names = sorted(own)
    found = interval.record(means, report)
    config = pyramid_config(zero={"stage": 3})
    engine, _ = build_engine(build_model(PyramidTask(config, world), 0), config, world)
    with torch.no_grad():
        for partition in BranchWatch(engine, engine.module.parts())._scales.values():
            for part in partition:
                part.mul_(-2.0)
    own = BranchWatch(engine, engine.module.parts()).own(with_gradients=False)
    return found, means, result.message_seconds, names, read(mean_over_ranks(own, device), 0.0)


@pytest.fixture(scope="module")
def found():
    return run_ranks(2, interval_of_two)


def test_norms_by_part_are_those_of_the_whole_gradient_before_clipping(found):
    torch.manual_seed(0)
    model = TinyModel(drop=0.0)
    for rank in range(2):
        losses = model(batches_of(rank, STEPS - 1)[0])
        ((losses["loss_score"] + losses["loss_box"]) / 2).backward()
    norms = {
        name: torch.nn.utils.get_total_norm([parameter.grad for parameter in part.parameters()]).item()
        for name, part in model.parts().items()
    }
    for record, *_ in found:
        assert record.gradient_norms == pytest.approx(norms, rel=1e-4)
        assert sum(norm**2 for norm in norms.values()) ** 0.5 > 10 * CLIP


def test_a_rank_that_is_late_is_named_and_the_others_stand_still(found):
    for record, means, measured, *_ in found:
        assert means == {"loss": 1.0}
        assert record.slowest == RankPace(1, "n1", own_seconds=0.75, wait_seconds=0.125)
        assert record.fastest == RankPace(0, "n0", own_seconds=0.25, wait_seconds=0.125)
        assert record.message_seconds == 0.5
        assert measured > 0


def test_ranks_name_the_same_numbers_for_others_would_be_exchanged_as_lists(found):
    (*_, first, _), (*_, second, _) = found
    assert first == second


def test_padding_and_clipping_are_shares(found):
    for record, *_ in found:
        assert (record.padding_share, record.clipped_share) == (0.5, 1.0)
        assert record.attempt is None


def test_gammas_and_merging_weights_are_read_of_slices(found):
    for *_, (norms, gammas, merging) in found:
        assert norms == {}
        assert gammas == pytest.approx({"0": 0.2, "1": 0.2})
        assert merging == pytest.approx({"0": -2.0, "1": -2.0})
