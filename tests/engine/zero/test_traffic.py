"""What a step sends, against a slow twin that walks every hop of every ring; what is counted live is in
``tests/engine/test_layouts.py``."""

from __future__ import annotations

import pytest
from ranks import tiny_config
from test_zero_plan import branch

from piip_scale.engine.zero.plan import Parameter, Part, Sizes, plan_sharding
from piip_scale.engine.zero.traffic import bytes_between, bytes_inside, step_traffic, traffic_lines
from piip_scale.errors import ConfigError

SIZES = Sizes((branch("large", 192, 4), branch("small", 96, 4), Part("frozen", (Parameter("f", 999, True, False),))))
LAYOUTS = {
    "all": {},
    "node": {"shard_over": "node"},
    "half a node": {"shard_over": 2},
    "two nodes": {"shard_over": 8},
    "alone": {"shard_over": 1},
    "second copy": {"node_partition": 4},
    "resident": {"stage": 2},
}


def traffic_of(zero, num_ranks, ranks_per_node, precision="bf16", accumulation=3):
    config = tiny_config(zero=zero, train={"steps": 1, "precision": precision, "gradient_accumulation": accumulation})
    return step_traffic(SIZES, plan_sharding(config, SIZES, num_ranks, ranks_per_node))


def walked(each, num_ranks, ranks_per_node):
    """Bytes inside all nodes and between them, hop by hop."""
    inside = between = 0.0
    ranks, stride = each.num_ranks, each.stride
    starts = [start for start in range(num_ranks) if start // stride % ranks == 0]
    for start in starts:
        ring = [start + index * stride for index in range(ranks)]
        assert ring[-1] < num_ranks
        # A chunk goes round the ring once, but for its last hop; in an all-reduce twice.
        rounds = 2 if each.kind == "all-reduce" else 1
        for here, there in zip(ring, ring[1:] + ring[:1], strict=True):
            sent = each.per_step * rounds * (ranks - 1) * each.num_bytes / ranks
            if here // ranks_per_node == there // ranks_per_node:
                inside += sent
            else:
                between += sent
    assert len(starts) * ranks == num_ranks
    return inside, between


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("num_ranks", "ranks_per_node"), [(16, 4), (8, 8), (8, 4)])
def test_the_formula_is_the_sum_of_all_hops(layout, num_ranks, ranks_per_node):
    traffic = traffic_of(LAYOUTS[layout], num_ranks, ranks_per_node)
    assert traffic
    nodes = num_ranks // ranks_per_node
    for each in traffic:
        inside, between = walked(each, num_ranks, ranks_per_node)
        assert each.inside(ranks_per_node) * nodes == pytest.approx(inside)
        assert each.between(ranks_per_node) * nodes == pytest.approx(between)


def test_only_gradients_leave_a_node_and_once_a_step():
    traffic = traffic_of(LAYOUTS["node"], 16, 4)
    assert [each.name for each in traffic if each.between(4)] == ["gradients, replicas"]
    trained = sum(p.numel for p in SIZES.parameters if p.trainable)
    # Of four nodes in a ring each passes on three quarters of all sums, twice.
    assert bytes_between(traffic, 4) == pytest.approx(2 * 3 / 4 * 4 * trained)
    assert bytes_between(traffic_of(LAYOUTS["node"], 16, 4, accumulation=9), 4) == bytes_between(traffic, 4)
    assert bytes_between(traffic_of(LAYOUTS["all"], 16, 4), 4) > 3 * bytes_between(traffic, 4)


def test_bf16_messages_halve_what_leaves_a_node():
    halved = traffic_of({"shard_over": "node", "reduce_dtype": "bf16"}, 16, 4)
    assert bytes_between(halved, 4) == bytes_between(traffic_of(LAYOUTS["node"], 16, 4), 4) / 2


def test_one_node_sends_nothing_out_and_one_rank_nothing():
    for zero in LAYOUTS.values():
        assert bytes_between(traffic_of(zero, 8, 8), 8) == 0
    assert traffic_of({}, 1, 1) == ()
    assert traffic_lines((), 1) == []


def test_the_table_adds_up():
    traffic = traffic_of(LAYOUTS["node"], 16, 4)
    *_, last = traffic_lines(traffic, 4)
    assert last.split() == ["all", f"{bytes_inside(traffic, 4) / 1e6:.2f}", f"{bytes_between(traffic, 4) / 1e6:.2f}"]


@pytest.mark.parametrize(
    ("over", "num_ranks", "ranks_per_node", "group"),
    [("all", 8, 4, 8), ("node", 8, 4, 4), ("node", 4, 4, 4), (2, 8, 4, 2), (8, 16, 4, 8), (1, 4, 4, 1)],
)
def test_a_group_is_a_part_of_a_node_or_whole_nodes(over, num_ranks, ranks_per_node, group):
    plan = plan_sharding(tiny_config(zero={"shard_over": over}), SIZES, num_ranks, ranks_per_node)
    assert (plan.num_ranks, plan.num_replicas) == (group, num_ranks // group)


@pytest.mark.parametrize(("over", "num_ranks", "ranks_per_node"), [(3, 8, 4), (6, 12, 4), (16, 8, 4), ("node", 9, 4)])
def test_other_groups_are_refused_in_a_line(over, num_ranks, ranks_per_node):
    with pytest.raises(ConfigError, match=f"zero.shard_over.*{over}.*divides the {num_ranks} ranks") as caught:
        plan_sharding(tiny_config(zero={"shard_over": over}), SIZES, num_ranks, ranks_per_node)
    assert "\n" not in caught.value.line


@pytest.mark.parametrize(
    "zero",
    [{"stage": 2}, {"offload_optimizer": "cpu"}, {"node_partition": 2}, {"offload_parameters": "cpu"}],
)
def test_what_does_not_go_with_replicas_is_refused_in_the_config(zero):
    with pytest.raises(ConfigError, match=f"{next(iter(zero))}.*shard_over|shard_over.*stage"):
        tiny_config(zero=zero | {"shard_over": "node"})


def test_a_raw_key_that_keeps_deepspeeds_own_update_is_refused_beside_replicas():
    raw = {"zero_optimization": {"reduce_scatter": False}}
    config = tiny_config(zero={"shard_over": 2, "deepspeed": raw})
    assert plan_sharding(config, SIZES, 2).num_replicas == 1
    with pytest.raises(ConfigError, match=r"reduce_scatter.*replicas of zero\.shard_over=2 sum plain"):
        plan_sharding(config, SIZES, 4)
