"""What is sent in a step of a real detector under ZeRO-3, seen at torch's dispatcher."""

from __future__ import annotations

import pytest
from preloaded import run_ranks
from sections.collectives import step_messages


def both(world, device):
    return step_messages(world, device, False) | {"checkpointed": step_messages(world, device, True)}


@pytest.fixture(scope="module")
def found():
    return run_ranks(2, both, timeout_s=500)[0]


def messages(found, phase, kind):
    return [m.elements for m in found["messages"] if (m.phase, m.kind) == (phase, kind)]


@pytest.mark.parametrize("phase", ["forward", "backward"])
@pytest.mark.parametrize("blocks", ["kept", "checkpointed"])
def test_each_unit_travels_once_a_pass_in_one_message_and_no_resident_does(found, phase, blocks):
    # Nothing is fetched ahead, so that no message holds more than a unit.
    of_blocks = found if blocks == "kept" else found["checkpointed"]
    assert sorted(messages(of_blocks, phase, "all-gather")) == sorted(of_blocks["sharded_by_unit"])


def test_small_branch_interactions_and_heads_send_nothing_in_their_forward_pass(found):
    inside = {m.inside for m in found["messages"]}
    assert {"branch 1", "interactions", "heads"} <= set(found["watched"])
    assert not inside & {"branch 1", "interactions", "heads"}
    # The pyramid's kernels are as large as the large branch's matrices, and are gathered as those are.
    assert "pyramid" in inside


def test_residents_come_once_after_the_update_in_one_message(found):
    assert messages(found, "update", "all-gather") == [found["resident"]]


def test_gradients_are_reduced_once_in_float32_and_nothing_else_is_sent(found):
    reduced = [m for m in found["messages"] if m.kind == "reduce-scatter"]
    assert sum(m.elements for m in reduced) == found["trainable"]
    assert all(m.num_bytes == 4 * m.elements and m.phase == "backward" for m in reduced)
    rest = [m for m in found["messages"] if m.kind not in ("all-gather", "reduce-scatter")]
    assert sum(m.elements for m in rest) <= 8
