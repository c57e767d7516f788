"""The table of raw keys: each reaches DeepSpeed, trains and resumes; all others are refused with a reason."""

from __future__ import annotations

import copy
from dataclasses import is_dataclass

import pytest
import resume_cells as cells
from pydantic import BaseModel
from ranks import tiny_config

from piip_scale.engine.zero.plan import Parameter, Part, Sizes, plan_sharding
from piip_scale.engine.zero.raw_keys import ALLOWED, AUTO, nested
from piip_scale.engine.zero.refused_keys import OWNED, REFUSED
from piip_scale.errors import ConfigError

SIZES = Sizes((Part("a", (Parameter("a.w", 10_000, True, True), Parameter("a.b", 100, False, True))),))


def planned(raw, **zero):
    return plan_sharding(tiny_config(zero={"deepspeed": raw} | zero), SIZES, 2).deepspeed


def fields_of(key):
    place = "/disk" if key.on_disk else "cpu"
    return {"stage": key.stages[-1]} | ({key.needs: place} if key.needs else {})


def refusal(raw, **zero) -> str:
    with pytest.raises(ConfigError) as caught:
        planned(raw, **zero)
    assert "\n" not in caught.value.line
    return caught.value.line


def content(value):
    """What DeepSpeed's parser made of a config, as plain values."""
    if isinstance(value, BaseModel):
        return {name: content(getattr(value, name)) for name in type(value).model_fields if hasattr(value, name)}
    if hasattr(value, "__dict__") and not callable(value) and not is_dataclass(value):
        return {name: content(inner) for name, inner in vars(value).items() if name != "_param_dict"}
    return {name: content(inner) for name, inner in value.items()} if isinstance(value, dict) else repr(value)


def parsed(config):
    from deepspeed.runtime.config import DeepSpeedConfig

    return content(DeepSpeedConfig(copy.deepcopy(config)))


@pytest.mark.parametrize("key", ALLOWED, ids=lambda key: key.path)
def test_each_allowed_key_reaches_deepspeed(key):
    if key.path == "zero_allow_untested_optimizer":
        assert planned(nested({key.path: True}))[key.path]
    plain = fields_of(key)
    beside = nested({key.without: False}) if key.without else {}
    # Prints are read where they are used, and a switch of comms_logger needs the section that it begins.
    assert parsed(planned(key.example, **plain)) != parsed(planned(beside, **plain))


@pytest.mark.parametrize("key", [key for key in ALLOWED if key.without], ids=lambda key: key.path)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_key_that_deepspeed_asserts_something_beside_is_refused_without(key, stage):
    raw = nested({key.path: key.sample})
    for beside in ({}, nested({key.without: True}), nested({key.without: AUTO})):
        line = refusal({**raw, **beside}, stage=stage)
        assert f"DeepSpeed takes it only where {key.without} is false" in line
    assert planned(nested({key.path: False}), stage=stage)[key.path] is False


@pytest.mark.parametrize("key", ALLOWED, ids=lambda key: key.path)
def test_a_value_that_breaks_a_keys_rule_is_one_line(key):
    for value in ("certainly not", -1):
        if key.path == "comms_logger.prof_ops":
            value = [value, 1]
        assert f"zero.deepspeed.{key.path}: got {value!r}; it is" in refusal(
            nested({key.path: value}), **fields_of(key)
        )


@pytest.mark.parametrize("path", REFUSED)
def test_each_refused_key_is_refused_with_its_reason_and_its_default_may_stand(path):
    default, reason = REFUSED[path]
    assert f"zero.deepspeed.{path}: got 'x'; not allowed: {reason}; leave it out" in refusal(nested({path: "x"}))
    if default is not None:
        assert planned(nested({path: default})) == planned({})
    assert reason in refusal(nested({f"{path}.enabled": True}))


def test_no_key_is_both():
    allowed = {key.path for key in ALLOWED}
    assert not allowed & REFUSED.keys() | allowed & OWNED.keys() | REFUSED.keys() & OWNED.keys()
    assert len(allowed) == len(ALLOWED)


def test_every_key_that_deepspeed_has_is_in_one_of_the_lists():
    """Fails when a new version has a new one: somebody has to say what it does to checkpoints."""
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config
    from deepspeed.runtime.zero import config as zero
    from deepspeed.runtime.zero import offload_config as offload

    sections = {
        "zero_optimization": zero.DeepSpeedZeroConfig,
        "zero_optimization.offload_param": offload.DeepSpeedZeroOffloadParamConfig,
        "zero_optimization.offload_optimizer": offload.DeepSpeedZeroOffloadOptimizerConfig,
        "bf16": DeepSpeedBF16Config,
    }
    known = {key.path for key in ALLOWED} | OWNED.keys() | REFUSED.keys()
    found = {
        f"{section}.{name}"
        for section, model in sections.items()
        for field, info in model.model_fields.items()
        for name in filter(None, (field, info.alias))
    }
    assert found - known - sections.keys() == set()


@pytest.mark.parametrize("path", [*(key.path for key in ALLOWED), *OWNED])
def test_auto_leaves_a_key_to_us(path):
    assert planned(nested({path: AUTO})) == planned({})


def test_whole_numbers_written_as_floats_are_taken():
    raw = {"zero_optimization": {"reduce_bucket_size": 5e8}}
    assert repr(planned(raw)["zero_optimization"]["reduce_bucket_size"]) == "500000000"
    assert "an even number" in refusal({"zero_optimization": {"reduce_bucket_size": 5}}, stage=2)


def test_a_section_is_a_section():
    assert "zero.deepspeed.zero_optimization: got 3; it is a section" in refusal({"zero_optimization": 3})
    assert "unknown key zero.deepspeed.steps_per_print" in refusal({"steps_per_print": {"often": 3}})


def test_a_key_of_an_offloading_that_is_not_there_is_refused():
    raw = {"zero_optimization": {"offload_param": {"pin_memory": False}}}
    assert "it refines zero.offload_parameters, which is 'none'; set zero.offload_parameters to cpu" in refusal(raw)


def of_stage(stage, option, move="2 -> 1", precision="fp32"):
    return cells.Cell(stage, option, "none", False, precision, move)


def assert_goes_on(pairs) -> None:
    for cell, pair in pairs.items():
        assert cells.is_equal(cell, cells.difference(*pair)), (cell, cells.difference(*pair))


# Keys of an offloading, and those that change numbers: these are not with the rest of their stage.
APART = [name for name, key in cells.ALONE.items() if key.needs or not key.keeps_numbers]


def apart(option):
    key = cells.ALONE[option]
    return of_stage(key.stages[-1], option, precision="fp32" if key.keeps_numbers else "bf16")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    chosen = [of_stage(stage, option) for option, stage in cells.TOGETHER.items()]
    chosen += [of_stage(stage, "plain") for stage in cells.STAGES]
    chosen += map(apart, APART)
    return cells.run_cells(tmp_path_factory.mktemp("keys"), chosen)


@pytest.mark.parametrize("option", cells.TOGETHER)
def test_all_keys_of_a_stage_train_to_the_same_numbers_and_resume_on_other_ranks(trained, option):
    stage = cells.TOGETHER[option]
    assert_goes_on({of_stage(stage, option): trained[of_stage(stage, option)]})
    whole, plain = (trained[of_stage(stage, name)][1] for name in (option, "plain"))
    assert whole.figures == pytest.approx(plain.figures, rel=1e-5)


@pytest.mark.parametrize("option", APART)
def test_keys_that_are_apart_resume_on_other_ranks(trained, option):
    assert_goes_on({apart(option): trained[apart(option)]})


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_each_key_alone_trains_and_resumes_on_other_ranks(tmp_path):
    chosen = [
        of_stage(stage, name, precision="fp32" if key.keeps_numbers else "bf16")
        for name, key in cells.ALONE.items()
        for stage in key.stages
        if stage
    ]
    plain = [of_stage(stage, "plain") for stage in cells.STAGES]
    found = cells.run_cells(tmp_path, chosen + plain)
    for cell in chosen:
        assert_goes_on({cell: found[cell]})
        if cells.ALONE[cell.option].keeps_numbers:
            expected = found[of_stage(cell.stage, "plain")][1].figures
            assert found[cell][1].figures == pytest.approx(expected, rel=1e-5), cell
