"""What is alive while gradients are made and sent, on backward passes of two parameters."""

from __future__ import annotations

import math

import pytest

from piip_scale.engine.planning.passes import Gathered, Passes, Way, passes_of
from piip_scale.engine.rehearsal import Moment

KEPT = 100.0
MOMENTS = (Moment(50, 100, 60), Moment(50, 70, 0), Moment(0, 0, 0))


def of(way, whole=None, share=1.0):
    return passes_of(MOMENTS, share, share * KEPT, way, whole or Gathered())


def test_gradients_that_come_as_activations_go_are_no_more_than_these():
    # 100 and none of the gradients yet, then 70 and half of them.
    assert of(Way(math.inf, making=1)) == Passes(backward=0.0, buckets=0.0, later=80.0)
    assert of(Way(math.inf, making=0.1)).later == pytest.approx(10.0)


@pytest.mark.parametrize(
    ("bucket", "most"),
    [
        # Both parameters wait, and go together when no activations are left.
        (100, 100 * (2 + 6)),
        # The first one goes when the second one's gradient is there.
        (50, 100 * 2 + 50 * 6),
    ],
)
def test_a_message_costs_when_its_bucket_is_full(bucket, most):
    assert of(Way(bucket, waiting=2, sending=6)).buckets == most - KEPT


def test_messages_under_way_hold_their_gradients():
    # The second message goes while the first one flies.
    assert of(Way(50, waiting=2, sending=6, flying=1000)).buckets == 50 * (2 + 6) + 1000 - KEPT


def test_what_is_gathered_goes_with_its_gradients():
    whole = Gathered(all=400.0, most=300.0)
    assert of(Way(100, waiting=2, sending=6), whole).buckets == 100 * (2 + 6) - KEPT - whole.most
    assert of(Way(100), whole) == Passes(0.0, 0.0, 0.0)


def test_what_the_backward_pass_computes_again_comes_on_top_of_what_is_kept():
    again = (Moment(50, 130, 60), *MOMENTS[1:])
    assert passes_of(again, 2.0, 2 * KEPT, Way(math.inf), Gathered()).backward == 2 * 30
