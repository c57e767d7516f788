"""Refusals before a rank starts: each one line, from the table of raw keys and from DeepSpeed's own parser."""

from __future__ import annotations

import pytest
import torch
from ranks import tiny_config
from tiny_task import TinyModel

from piip_scale.engine.zero import extensions
from piip_scale.engine.zero.checks import checked_plan
from piip_scale.engine.zero.raw_keys import Key, Rule
from piip_scale.engine.zero.refused_keys import REFUSED
from piip_scale.errors import ConfigError, KernelError
from piip_scale.world import World

ANYTHING = Key("gradient_allreduce_op", Rule("", lambda value: True), "", None)


def plan(world=None, **zero):
    with torch.device("meta"):
        return checked_plan(TinyModel(), tiny_config(zero=zero), world or World())[1]


def refusal(kind, **kwargs):
    with pytest.raises(kind) as caught:
        plan(**kwargs)
    assert "\n" not in caught.value.line
    return caught.value.line


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"zero_optimisation": {"stage": 3}}, "zero_optimisation: got {'stage': 3}; did you mean zero_optimization"),
        (
            {"zero_optimization": {"overlap_com": True}},
            "zero_optimization.overlap_com: got True; did you mean overl",
        ),
        ({"zero_optimization": {"max_live_params": 1}}, "did you mean max_live_parameters"),
        ({"zero_optimization": {"offload_param": {"pin_memry": True}}}, "offload_param.pin_memry: got True; did you"),
        ({"aio": {"queue_dept": 4}}, "aio.queue_dept: got 4; did you mean queue_depth?"),
        ({"checkpoint": {"tag_validatio": "Warn"}}, "did you mean tag_validation?"),
        ({"comms_logger": {"colour": 1}}, "DeepSpeed has debug, enabled, prof_all"),
    ],
)
def test_an_unknown_raw_key_is_told_with_the_nearest_ones(raw, said):
    zero = {"offload_parameters": "cpu"} if "pin_memry" in str(raw) else {}
    line = refusal(ConfigError, deepspeed=raw, **zero)
    assert line.startswith("unknown key zero.deepspeed.")
    assert said in line


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (
            {"zero_optimization": {"sub_group_size": -4}},
            "zero_optimization.sub_group_size: got -4; it is a whole number of at least 1",
        ),
        ({"zero_optimization": {"mics_shard_size": 4}}, "MiCS ZeRO-3 sharding has been removed"),
        ({"gradient_allreduce_op": "sum"}, "not supported with ZeRO stage 3"),
    ],
)
def test_a_value_that_deepspeed_refuses_is_one_line(raw, said):
    assert said in refusal(ConfigError, deepspeed=raw)


def test_a_removed_key_is_never_suggested():
    assert "sparse_gradients" not in refusal(ConfigError, deepspeed={"sparse_gradient": True})


@pytest.mark.parametrize(
    "raw",
    [
        {"zero_optimization": {"overlap_comm": True, "stage3_max_live_parameters": 7, "max_reuse_distance": 0}},
        {"aio": {"queue_depth": 4}, "wall_clock_breakdown": False, "steps_per_print": 5},
        {"data_types": {"grad_accum_dtype": "bf16"}, "comms_logger": {"enabled": False}},
    ],
)
def test_keys_that_deepspeed_has_pass(raw):
    assert plan(deepspeed=raw).stage == 3


def test_what_deepspeeds_parser_still_refuses_is_one_line(monkeypatch):
    # A contradiction that no rule of one key can see.
    monkeypatch.setattr("piip_scale.engine.zero.raw_keys._BY_PATH", {"gradient_allreduce_op": ANYTHING})
    monkeypatch.delitem(REFUSED, "gradient_allreduce_op")
    raw = {"gradient_allreduce_op": "sum"}
    assert "DeepSpeed refuses zero.deepspeed: gradient_allreduce_op='sum'" in refusal(ConfigError, deepspeed=raw)


def test_a_part_of_a_node_divides_it():
    node = World(num_ranks=16, ranks_per_node=8)
    assert plan(node, node_partition=8).zero.node_partition == 8
    assert "got 3; it divides the 8 ranks of each node; take 8" in refusal(ConfigError, world=node, node_partition=3)
    assert "got 2" in refusal(ConfigError, node_partition=2)


def test_a_disk_needs_a_folder_and_the_means_to_build_its_driver(tmp_path, monkeypatch):
    assert "exists and can be written" in refusal(ConfigError, offload_optimizer=str(tmp_path / "absent"))
    from deepspeed.ops.op_builder import AsyncIOBuilder

    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda *_: False)
    monkeypatch.setattr(extensions.shutil, "which", lambda _: None)
    line = refusal(KernelError, offload_parameters=str(tmp_path))
    assert "no libaio and no c++ and no ninja" in line
    assert "set zero.offload_parameters='cpu'" in line
    monkeypatch.undo()
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda *_: True)
    monkeypatch.setattr(extensions.shutil, "which", lambda tool: f"/usr/bin/{tool}")
    assert plan(offload_optimizer=str(tmp_path)).deepspeed["zero_optimization"]["offload_optimizer"]["device"] == "nvme"
