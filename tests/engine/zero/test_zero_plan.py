import json
from pathlib import Path

import pytest
import torch
from ranks import tiny_config
from torch import nn

from piip_scale.engine.report import bytes_per_rank, start_report
from piip_scale.engine.zero.plan import Parameter, Part, Sizes, measure, plan_sharding
from piip_scale.errors import ConfigError, ModelError


def branch(name: str, width: int, depth: int) -> Part:
    """A vision transformer's parameters: four matrices a block, norms and scales, embeddings."""
    sizes = {"qkv": 3 * width**2, "proj": width**2, "fc1": 4 * width**2, "fc2": 4 * width**2}
    blocks = [
        Parameter(f"{name}.{i}.{key}", numel, True, True) for i in range(depth) for key, numel in sizes.items()
    ] + [Parameter(f"{name}.{i}.norm", width, False, True) for i in range(depth)]
    embeddings = [
        Parameter(f"{name}.patch", 768 * width, True, True),
        Parameter(f"{name}.pos", 257 * width, True, True),
    ]
    return Part(name, tuple(embeddings + blocks))


def test_h6b_keeps_everything_below_the_large_branch_whole():
    sizes = Sizes((branch("internvit", 3200, 48), branch("mae_huge", 1280, 32)))
    plan = plan_sharding(tiny_config(), sizes, 8)
    assert 6_553_600 <= plan.threshold < 10_240_000
    sharded = [p for p in sizes.parameters if plan.shards(p)]
    assert len(sharded) == 192
    assert all(p.name.startswith("internvit.") for p in sharded)
    assert plan.deepspeed["zero_optimization"]["stage3_param_persistence_threshold"] == plan.threshold


@pytest.mark.parametrize(("large", "small"), [(192, 96), (64, 48), (384, 384)])
def test_the_large_branch_is_sharded_whatever_the_sizes(large, small):
    sizes = Sizes((branch("large", large, 4), branch("small", small, 4)))
    plan = plan_sharding(tiny_config(), sizes, 2)
    matrices = [p for p in sizes.parts[0].parameters if p.is_matrix and not p.name.endswith(("patch", "pos"))]
    assert all(plan.shards(p) for p in matrices)
    assert not any(plan.shards(p) for p in sizes.parameters if not p.is_matrix)


def test_torchs_linear_serves_everywhere():
    plan = plan_sharding(tiny_config(), Sizes((branch("vit", 32, 2),)), 8)
    assert plan.deepspeed["zero_optimization"]["memory_efficient_linear"] is False


def test_a_single_branch_shards_its_matrices():
    sizes = Sizes((branch("vit", 192, 12),))
    plan = plan_sharding(tiny_config(), sizes, 2)
    assert sum(plan.shards(p) for p in sizes.parameters if not p.name.endswith(("patch", "pos"))) == 48


def test_a_threshold_of_the_config_means_fewer_elements():
    sizes = Sizes((Part("a", (Parameter("a.at", 1000, True, True), Parameter("a.below", 999, True, True))),))
    plan = plan_sharding(tiny_config(zero={"persistence_threshold": 1000}), sizes, 2)
    assert [p.name for p in sizes.parameters if plan.shards(p)] == ["a.at"]


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        ({"zero_optimization": {"stage": 2}}, r"zero.deepspeed.zero_optimization.stage.*zero.stage decides it.*3"),
        ({"zero_optimization": {"param_persistence_threshold": 7}}, "zero.persistence_threshold"),
        ({"bf16": {"enabled": True}}, "train.precision"),
        ({"fp16": {"enabled": True}}, "train.precision"),
        ({"gradient_accumulation_steps": 4}, "train.gradient_accumulation"),
        ({"train_batch_size": 64}, "data.micro_batch_size"),
        ({"optimizer": {"type": "Lion"}}, "optimizer decides it"),
        ({"zero_optimization": {"leaf_module": {"classes": ["A"]}}}, "heads_module"),
        ({"scheduler": {"type": "WarmupLR"}}, "schedule"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "zero.offload_optimizer decides it"),
        ({"zero_optimization": {"offload_param": {"nvme_path": "/x"}}}, "zero.offload_parameters"),
        ({"zero_optimization": {"zero_hpz_partition_size": 8}}, "zero.node_partition"),
        ({"torch_autocast": {"enabled": True}}, "train.precision"),
    ],
)
def test_a_raw_key_that_contradicts_names_both(raw, named):
    with pytest.raises(ConfigError, match=named) as caught:
        plan_sharding(tiny_config(zero={"deepspeed": raw}), Sizes((branch("a", 8, 2),)), 1)
    assert "\n" not in caught.value.line


@pytest.mark.parametrize(
    ("zero", "expected"),
    [
        ({}, {}),
        ({"stage": 2, "offload_optimizer": "cpu"}, {"offload_optimizer": {"device": "cpu"}}),
        (
            {"offload_optimizer": "/nvme", "offload_parameters": "/nvme"},
            {
                "offload_optimizer": {"device": "nvme", "nvme_path": "/nvme"},
                "offload_param": {"device": "nvme", "nvme_path": "/nvme", "buffer_size": 768 * 8 // 4, "max_in_cpu": 0},
            },
        ),
        ({"offload_parameters": "cpu"}, {"offload_param": {"device": "cpu"}}),
        ({"node_partition": 2}, {"zero_hpz_partition_size": 2}),
    ],
)
def test_a_field_of_ours_is_what_deepspeed_calls_it(zero, expected):
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    plan = plan_sharding(tiny_config(zero=zero), Sizes((branch("a", 8, 2),)), 4)
    keys = plan.deepspeed["zero_optimization"]
    names = ("offload_optimizer", "offload_param", "zero_hpz_partition_size")
    assert {name: keys[name] for name in names if name in keys} == expected
    DeepSpeedZeroConfig(**keys)


def test_raw_keys_refine_a_field_of_ours():
    raw = {"zero_optimization": {"offload_optimizer": {"pin_memory": False}}}
    config = tiny_config(zero={"offload_optimizer": "cpu", "deepspeed": raw})
    plan = plan_sharding(config, Sizes((branch("a", 8, 2),)), 1)
    assert plan.deepspeed["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": False}


@pytest.mark.parametrize(
    ("zero", "said"),
    [
        ({"stage": 0, "offload_optimizer": "cpu"}, "offload_optimizer needs stage 1, 2 or 3"),
        ({"stage": 2, "offload_optimizer": "/nvme"}, "offload_optimizer to a disk needs stage=3, got stage=2"),
        ({"stage": 1, "offload_parameters": "cpu"}, "offload_parameters needs stage=3, got stage=1"),
        ({"stage": 2, "node_partition": 2}, "node_partition needs stage=3"),
        ({"offload_parameters": "gpu"}, "'none', 'cpu' or the absolute path"),
        ({"node_partition": 0}, "greater than 0"),
    ],
)
def test_what_a_stage_cannot_is_refused_with_the_config(zero, said):
    with pytest.raises(ConfigError, match=said):
        tiny_config(zero=zero)


def test_raw_keys_go_on_top_and_agreeing_ones_pass():
    raw = {"zero_optimization": {"stage": 3, "reduce_bucket_size": 4096, "overlap_comm": True}, "steps_per_print": 1}
    plan = plan_sharding(tiny_config(zero={"deepspeed": raw}), Sizes((branch("a", 8, 2),)), 1)
    zero = plan.deepspeed["zero_optimization"]
    assert (zero["reduce_bucket_size"], zero["overlap_comm"], plan.deepspeed["steps_per_print"]) == (4096, True, 1)
    assert "stage3_param_persistence_threshold" in zero


def test_bf16_without_zero_has_no_master_weights():
    config = tiny_config(zero={"stage": 0}, train={"precision": "bf16"})
    with pytest.raises(ConfigError, match=r"zero.stage=0.*set zero.stage=1"):
        plan_sharding(config, Sizes((branch("a", 8, 2),)), 1)


def test_measure_counts_every_parameter_once_and_the_rest_too():
    model = nn.ModuleDict({"a": nn.Linear(3, 4), "b": nn.Linear(4, 5), "c": nn.Linear(5, 6)})
    model["b"].weight = nn.Parameter(torch.zeros(5, 4), requires_grad=False)
    model["c"].extra = model["a"].weight
    sizes = measure(model, {"a": model["a"], "b": model["b"]})
    assert [(part.name, part.numel) for part in sizes.parts] == [("a", 16), ("b", 25), ("rest", 36)]
    assert sizes.numel == sum(p.numel() for p in model.parameters())
    assert [p.name for p in sizes.parameters if not p.trainable] == ["b.weight"]
    with pytest.raises(ModelError, match="outside the model"):
        measure(model, {"x": nn.Linear(1, 1)})


def test_bytes_follow_the_arithmetic_of_eighteen_per_parameter():
    part = branch("a", 64, 3)
    whole = Sizes((part,))
    bf16 = tiny_config(train={"precision": "bf16"}, zero={"persistence_threshold": 0})
    assert bytes_per_rank(part, plan_sharding(bf16, whole, 1)).total == pytest.approx(18 * part.numel)
    assert bytes_per_rank(part, plan_sharding(bf16, whole, 8)).total == pytest.approx(18 * part.numel / 8)
    averaged = tiny_config(train={"precision": "bf16", "ema_decay": 0.9}, zero={"persistence_threshold": 0})
    assert bytes_per_rank(part, plan_sharding(averaged, whole, 8)).total == pytest.approx(22 * part.numel / 8)
    plain = tiny_config(zero={"stage": 0})
    assert bytes_per_rank(part, plan_sharding(plain, whole, 8)).total == pytest.approx(16 * part.numel)


def test_residents_of_a_single_rank_count_once():
    part = branch("a", 64, 3)
    plan = plan_sharding(tiny_config(train={"precision": "bf16"}), Sizes((part,)), 1)
    assert any(not plan.shards(p) for p in part.parameters)
    assert bytes_per_rank(part, plan).total == pytest.approx(18 * part.numel)


def test_the_second_copy_of_a_node_costs_its_share():
    part = branch("a", 64, 3)
    plans = {size: plan_sharding(tiny_config(zero={"node_partition": size}), Sizes((part,)), 8) for size in (1, 4, 8)}
    kept = {size: bytes_per_rank(part, plan).weights for size, plan in plans.items()}
    sharded = sum(p.numel for p in part.parameters if p.is_matrix)
    assert kept[8] - kept[1] == pytest.approx(4 * sharded / 8)
    assert kept[4] - kept[1] == pytest.approx(4 * sharded / 4)


def test_offloading_moves_bytes_and_adds_none():
    part = branch("a", 64, 3)
    sizes = Sizes((part,))
    both = {"offload_optimizer": "cpu", "offload_parameters": "/mnt/nvme", "persistence_threshold": 0}
    here = bytes_per_rank(part, plan_sharding(tiny_config(zero={"persistence_threshold": 0}), sizes, 8))
    moved = bytes_per_rank(part, plan_sharding(tiny_config(zero=both), sizes, 8))
    assert moved.total == here.total == here.device
    assert (moved.device, moved.host) == pytest.approx((0, here.total))
    title, head, row = start_report(sizes, plan_sharding(tiny_config(zero=both), sizes, 8))[:3]
    assert "optimiser offloaded to host memory, parameters offloaded to /mnt/nvme" in title
    assert (head.split()[-1], row.split()[-1]) == ("offloaded", f"{here.total / 2**20:,.1f}")


def test_the_report_has_a_row_for_each_part_and_adds_up():
    sizes = Sizes((branch("internvit", 3200, 48), branch("mae_huge", 1280, 32)))
    lines = start_report(sizes, plan_sharding(tiny_config(), sizes, 8))
    rows = {line.split()[0]: [int(c.replace(",", "")) for c in line.split()[1:5]] for line in lines[2:5]}
    assert rows["total"] == [a + b for a, b in zip(rows["internvit"], rows["mae_huge"], strict=True)]
    assert rows["internvit"][2] == 48 * 12 * 3200**2
    assert rows["mae_huge"][2] == 0
    assert "10,240,000 or more" in lines[-1]


def test_the_dict_is_plain_json():
    plan = plan_sharding(tiny_config(train={"precision": "bf16"}), Sizes((branch("a", 8, 2),)), 1)
    assert json.loads(json.dumps(plan.deepspeed)) == plan.deepspeed


def test_the_decision_needs_no_deepspeed():
    source = Path(plan_sharding.__code__.co_filename).read_text()
    assert "import deepspeed" not in source
