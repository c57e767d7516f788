import math

import pytest
import torch
from tiny_configs import tiny_config
from tiny_task import TinyTask
from torch import nn

from piip_scale.engine.bad_steps import reason_of
from piip_scale.engine.loss_trend import LossTrend
from piip_scale.engine.replay import FirstNotFinite, replayed
from piip_scale.engine.step import LARGEST_LOSS
from piip_scale.run.bad_steps import RankOfBadStep


def trend(ratio, steps=3):
    return LossTrend(tiny_config(train={"max_loss_ratio": ratio, "loss_trend_steps": steps}).train)


def test_a_loss_is_judged_by_the_median_of_the_last_applied_steps():
    judge = trend(4.0)
    limits = []
    for loss in (1.0, 100.0, 2.0, 3.0, 2.0):
        limits.append(judge.limit)
        judge.add({"loss_a": loss / 2, "loss_b": loss / 2, "acc": 50.0})
    assert [*limits, judge.limit] == [LARGEST_LOSS] * 3 + [8.0, 12.0, 8.0]


@pytest.mark.parametrize(("ratio", "losses"), [(None, [1.0] * 9), (2.0, [-1.0] * 9), (2.0, [1e38 * 3] * 9)])
def test_where_a_ratio_says_nothing_every_finite_loss_is_taken(ratio, losses):
    judge = trend(ratio)
    for loss in losses:
        judge.add({"loss": loss})
    assert judge.limit == LARGEST_LOSS


def test_the_reason_names_ranks_and_limits():
    fine, high = (RankOfBadStep({"loss_a": loss, "acc": math.nan}, 5.0, []) for loss in (1.0, 7.0))
    bad = RankOfBadStep({"loss_a": math.inf}, 5.0, [])
    assert reason_of([fine, bad, fine, bad]) == "the loss of rank 1, 3 was not finite"
    assert reason_of([fine, high]) == "the loss of rank 1 was 7, above train.max_loss_ratio's 5"
    assert reason_of([fine, fine]) == "its gradient was not finite"


class Spoilt(nn.Module):
    """Finite going forward, and not backward: the root of nothing has no slope."""

    def forward(self, x):
        return x + (x * 0.0).sqrt()


def found_in(model, *, weights=False):
    task = TinyTask(tiny_config(), None, drop=0.0)
    first = FirstNotFinite()
    if weights:
        first.look_at_weights(model)

    def task_of(world):
        task.world = world
        return task

    batches = list(replayed(model, task_of, task.config, 1, 2, first))
    return first.found, batches


def test_the_first_value_that_is_not_finite_is_named_by_module_and_micro_batch():
    def model():
        torch.manual_seed(0)
        return TinyTask(tiny_config(), None, drop=0.0).build_model()

    found, batches = found_in(model())
    assert found is None
    assert [(batch.rank, batch.keys) for batch in batches] == [(0, ("2_0", "2_1")), (1, ("3_0", "3_1"))]
    assert all(batch.keys == batch.asked_keys for batch in batches)
    forward = model()
    forward.large.blocks[1].norm.weight.data[3] = math.inf
    found, batches = found_in(forward)
    assert found.startswith("rank 0, micro-batch 0: the output of large.blocks.1.norm (LayerNorm); its inputs were fin")
    assert math.isnan(batches[-1].grad_norm)
    assert found_in(forward, weights=True)[0].endswith(
        "of the checkpoint itself, the first of them large.blocks.1.norm.weight"
    )
    backward = model()
    backward.join = nn.Sequential(backward.join, Spoilt())
    found, _ = found_in(backward)
    assert found.startswith("rank 0, micro-batch 0: the gradient of join.0.")
