"""A step's time against sums by hand, a slow twin that runs the pipeline job by job, and the laws it obeys."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_configs import tiny_config

from piip_scale.engine.gpus import GPUS, gpu_named
from piip_scale.engine.planning.cluster import GLOO, Cluster, Link, cpu_cluster, gpu_cluster
from piip_scale.engine.planning.step_time import Phase, StepTime, step_time
from piip_scale.engine.planning.work import PartWork, RunWork
from piip_scale.engine.zero.plan import Parameter, Part, Sizes, plan_sharding
from piip_scale.engine.zero.traffic import step_traffic
from piip_scale.errors import ConfigError

# Four units of two matrices of a million, which are sharded, beside a million that stays whole.
MATRIX = 1_000_000
UNITS = [Parameter(f"large.{i}.{j}", MATRIX, True, True, unit=f"large.{i}") for i in range(4) for j in range(2)]
SIZES = Sizes((Part("large", tuple(UNITS)), Part("small", (Parameter("small.0", MATRIX // 4, True, True),) * 4)))
WORK = RunWork((PartWork("large", 3e9, 6e9, 3e9), PartWork("heads", 1e9, 2e9, is_fp32=True)), (100, 200))
LAYOUTS = [{"stage": stage} for stage in (0, 1, 2, 3)] + [{"shard_over": "node"}, {"node_partition": 2}]
LAYOUTS += [{"offload_optimizer": "cpu"}, {"offload_optimizer": "cpu", "offload_parameters": "cpu"}]


def cluster(num_ranks=4, ranks_per_node=2, **changes) -> Cluster:
    plain = Cluster(num_ranks, ranks_per_node, 1e9, 1e9, Link(1e9), Link(1e8), operator_s=1e-3)
    return replace(plain, **changes)


def time_of(zero=None, on=None, images=1, micros=1, precision="fp32") -> StepTime:
    on = on or cluster()
    train = {"steps": 1, "precision": precision, "gradient_accumulation": micros}
    config = tiny_config(zero=zero or {}, data={"micro_batch_size": images}, train=train)
    plan = plan_sharding(config, SIZES, on.num_ranks, on.ranks_per_node)
    return step_time(WORK, SIZES, plan, step_traffic(SIZES, plan), on)


def test_one_rank_computes_and_updates_and_the_host_may_be_slower():
    found = time_of(on=cluster(1, 1, memory_bytes_per_s=1e9), images=2, micros=3)
    # Forward 4 and backward 12 GFLOP an image, at 1 GFLOP/s; gradients of 9 M move 20 bytes an element and micro-batch.
    gradients = 9 * MATRIX * (4 + 4 + 12) / 1e9
    assert [(phase.name, phase.times) for phase in found.phases] == [("forward", 3), ("backward", 3), ("update", 1)]
    assert found.seconds == pytest.approx(3 * (2 * 4 + 2 * 11 + gradients) + 9 * MATRIX * 32 / 1e9)
    assert found.images == 6
    slow_host = time_of(on=cluster(1, 1, operator_s=1.0), images=2, micros=3)
    assert slow_host.seconds == pytest.approx(3 * (100 + 200))
    assert slow_host.bound_by == "the host"
    serial = time_of(on=cluster(1, 1, operator_s=1.0, asynchronous=False), images=2, micros=3)
    assert serial.seconds == pytest.approx(3 * (2 * 4 + 2 * 11 + 100 + 200))


def test_flat_sharding_waits_for_the_network_as_the_bytes_say():
    found = time_of(precision="bf16")
    forward, backward, update = found.phases
    # Of 8 M gathered elements in bf16, three quarters pass each hop; a node's link carries one ring's.
    assert forward.outer == pytest.approx(3 / 4 * 16e6 / 1e8)
    assert forward.inner == pytest.approx(3 / 4 * 16e6 / 1e9)
    assert forward.messages == 4
    # And 9 M sums in float32.
    assert backward.outer == pytest.approx(3 / 4 * (16e6 + 36e6) / 1e8)
    assert update.exposed == pytest.approx(3 / 4 * 2e6 / 1e8)


def test_replicas_meet_in_the_last_backward_pass_only():
    found = time_of({"shard_over": "node"}, micros=3)
    by_name = {phase.name: phase for phase in found.phases}
    assert {name: phase.times for name, phase in by_name.items()} == {
        "forward": 3,
        "last backward": 1,
        "backward": 2,
        "update": 1,
    }
    # Two groups of two replicas each send all of their half of the sums once there and back: 2 * 1/2 * 18 MB.
    assert by_name["last backward"].outer == pytest.approx(2 * 18e6 / 1e8)
    assert by_name["backward"].outer == by_name["forward"].outer == by_name["update"].exposed * 0 == 0
    assert found.of("backward") == pytest.approx(by_name["last backward"].seconds + 2 * by_name["backward"].seconds)


def test_a_second_copy_is_gathered_over_all_ranks_in_the_first_forward_pass_only():
    first, forward, *_ = time_of({"node_partition": 2}, micros=3).phases
    assert (first.name, first.times, forward.name, forward.times) == ("first forward", 1, "forward", 2)
    assert first.outer > 0 == forward.outer


def test_gloo_sends_sums_twice_and_waits_for_them():
    both = [time_of(on=cluster(transport=each)).phases[1] for each in (cluster().transport, GLOO)]
    assert both[0].exposed == 0
    assert both[1].exposed == pytest.approx(2 * 3 / 4 * 36e6 / 1e8)


def test_gathers_that_are_not_begun_early_hide_behind_nothing():
    early, late = (
        time_of({"deepspeed": {"zero_optimization": {"stage3_prefetch_bucket_size": size}}}).phases[0]
        for size in (10**6, 0)
    )
    assert early.exposed == 0
    assert late.exposed == pytest.approx(early.outer)
    assert late.seconds > early.seconds


def test_latency_counts_hops_and_messages():
    plain, slow = (time_of(on=cluster(outer=Link(1e8, latency))).phases[0] for latency in (0.0, 1.0))
    # Two of three hops are between the nodes, for each of four units.
    assert slow.outer - plain.outer == pytest.approx(4 * 2)


def test_each_message_costs_the_host():
    plain, slow = (time_of(on=cluster(message_s=cost, asynchronous=False), precision="bf16") for cost in (0.0, 1.0))
    # Four units are gathered twice; their sums leave as one bucket, and what stays whole is gathered after the update.
    added = [after.host - before.host for before, after in zip(plain.phases, slow.phases, strict=True)]
    assert added == pytest.approx([4, 5, 1])
    assert slow.seconds - plain.seconds == pytest.approx(10)


def test_sockets_cost_the_host_each_byte_that_it_passes_on():
    plain, slow = (time_of(on=cluster(socket_bytes_per_s=rate, asynchronous=False)) for rate in (math.inf, 1e6))
    added = [after.host - before.host for before, after in zip(plain.phases, slow.phases, strict=True)]
    # Three quarters of 8 M elements are gathered twice, of the sums of 9 M sent once, and of a resident 1 M gathered.
    assert added == pytest.approx([24.0, 24.0 + 27.0, 3.0])
    assert slow.seconds - plain.seconds == pytest.approx(sum(added))


@pytest.mark.parametrize(("precision", "added"), [("fp32", 2), ("bf16", 3)])
def test_without_slices_of_gradients_they_are_added_up_and_sent_once(precision, added):
    on = cluster(memory_bytes_per_s=1e9)
    *_, backward, update = time_of({"stage": 1}, on, micros=3, precision=precision).phases
    element = {"fp32": 4, "bf16": 2}[precision]
    assert 3 * (backward.compute - 11) == pytest.approx(added * 9e6 * 12 / 1e9)
    # Into messages in float32, and a quarter of the sums into the optimiser, which then updates as much.
    assert update.compute == pytest.approx((9e6 * (element + 4) + 9e6 / 4 * (12 + 32)) / 1e9)


def test_offloading_pays_on_the_way_and_in_host_memory():
    on = cluster(pcie=Link(1e9), host_bytes_per_s=1e9)
    *_, update = time_of({"offload_optimizer": "cpu"}, on, precision="bf16").phases
    # Two ranks of a node update a quarter of the state each.
    assert update.compute == pytest.approx(2 * 9 * MATRIX / 4 * 32 / 1e9)
    assert update.pcie == pytest.approx(9 * MATRIX / 4 * 2 / 1e9)
    forward, backward, _ = time_of({"offload_optimizer": "cpu", "offload_parameters": "cpu"}, on).phases
    assert forward.pcie == pytest.approx(8 * MATRIX / 4 * 4 / 1e9)
    assert backward.pcie == pytest.approx(forward.pcie + 9 * MATRIX / 4 * 4 / 1e9)


def pipelined(terms, jobs):
    """Jobs of equal parts through machines in line, one after the other: when the last one leaves the last."""
    free = [0.0] * len(terms)
    for _ in range(jobs):
        ready = 0.0
        for machine, term in enumerate(terms):
            ready = free[machine] = max(free[machine], ready) + term / jobs
    return free[-1]


SECONDS = st.floats(0, 100)


@given(st.tuples(SECONDS, SECONDS, SECONDS, SECONDS), st.integers(1, 60))
@settings(max_examples=60, deadline=None)
def test_a_phase_is_a_pipeline_of_its_messages(terms, jobs):
    compute, inner, outer, pcie = terms
    phase = Phase("forward", 1, compute, inner, outer, pcie, messages=jobs)
    assert phase.seconds == pytest.approx(pipelined(terms, jobs))
    assert max(terms) <= phase.seconds * (1 + 1e-9)
    assert phase.seconds <= sum(terms) * (1 + 1e-9)


CHANGES = {
    "computing": lambda on, factor: replace(on, flops=on.flops * factor),
    "heads": lambda on, factor: replace(on, fp32_flops=on.fp32_flops * factor),
    "memory": lambda on, factor: replace(on, memory_bytes_per_s=on.memory_bytes_per_s * factor),
    "links inside": lambda on, factor: replace(on, inner=Link(on.inner.bytes_per_s * factor, on.inner.latency_s)),
    "network": lambda on, factor: replace(on, outer=Link(on.outer.bytes_per_s * factor, on.outer.latency_s)),
    "latency": lambda on, factor: replace(on, outer=Link(on.outer.bytes_per_s, on.outer.latency_s / factor)),
    "host": lambda on, factor: replace(on, operator_s=on.operator_s / factor),
    "host memory": lambda on, factor: replace(on, host_bytes_per_s=on.host_bytes_per_s * factor),
}


@given(st.sampled_from(LAYOUTS), st.sampled_from(sorted(CHANGES)), st.floats(1, 100), st.integers(1, 3), st.booleans())
@settings(max_examples=60, deadline=None)
def test_nothing_that_is_faster_makes_a_step_slower(zero, what, factor, micros, gloo):
    rates = {"memory_bytes_per_s": 1e9, "pcie": Link(1e9), "host_bytes_per_s": 1e9, "outer": Link(1e8, 1e-3)}
    on = cluster(**rates, **({"transport": GLOO, "asynchronous": False} if gloo else {}))
    before, after = (time_of(zero, each, micros=micros) for each in (on, CHANGES[what](on, factor)))
    assert after.seconds <= before.seconds * (1 + 1e-9)
    assert math.isclose(before.images_per_s * before.seconds, before.images)


@pytest.mark.parametrize("zero", LAYOUTS)
def test_one_node_does_not_ask_the_network(zero):
    fast, none = (time_of(zero, cluster(2, 2, outer=Link(rate))) for rate in (1e12, 1.0))
    assert fast.seconds == none.seconds


def test_accumulating_costs_flat_sharding_more_than_replicas():
    flat, replicas = (
        [time_of(zero, micros=micros).seconds for micros in (1, 4)] for zero in ({}, {"shard_over": "node"})
    )
    assert flat[1] - flat[0] > replicas[1] - replicas[0]


def test_every_gpu_has_a_row_that_makes_sense():
    for gpu in GPUS.values():
        assert gpu.tf32_tflops < gpu.bf16_tflops
        assert gpu.pcie_gb_s <= gpu.link_gb_s < gpu.memory_gb_s
        found = time_of(on=gpu_cluster(gpu, 16, 8, 400), precision="bf16")
        assert 0 < found.mfu < 1
    assert time_of(on=cpu_cluster(4, 2, 10)).mfu is None
    assert gpu_named("H200") is GPUS["h200"]
    with pytest.raises(ConfigError, match="did you mean h200"):
        gpu_named("h20")
