"""Every config says only what is its own, loads, and its model builds (of the released ones, in their own tests)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from piip_scale.config import load_config

CONFIGS = Path(__file__).parents[2] / "configs"
RELEASED = {"_base_", "coco", "imagenet", "ade20k"}
ALL = sorted(CONFIGS.rglob("*.py"))
RUNS = [path for path in ALL if not RELEASED & set(path.parts)]


def relative(path):
    return str(path.relative_to(CONFIGS))


def own_values(path):
    values = {}
    exec(path.read_text(), {}, values)
    return values


def repeated_keys(own, inherited):
    """Keys that a file gives the value they have already; what replaces a dict whole repeats nothing of it."""
    if not isinstance(own, dict) or not isinstance(inherited, dict):
        return [()] if own == inherited else []
    both = [] if own.get("_delete_") else own.keys() & inherited.keys()
    return [(key, *rest) for key in both for rest in repeated_keys(own[key], inherited[key])]


def test_there_are_configs():
    assert {"digits.py", "boxes.py", "masks.py"} <= {path.name for path in RUNS}


@pytest.mark.parametrize("path", ALL, ids=relative)
def test_config_repeats_no_key_of_its_base(path):
    own = own_values(path)
    inherited = {}
    for base in own.pop("_base_", []):
        inherited |= Config.fromfile(path.parent / base, lazy_import=False).to_dict()
    assert repeated_keys(own, inherited) == []


def test_a_repeated_key_is_found():
    inherited = {"a": {"b": (1, 2), "c": 3}, "d": {"e": 5}}
    assert repeated_keys({"a": {"b": (1, 2), "c": 4}}, inherited) == [("a", "b")]
    assert repeated_keys({"a": {"c": 4}, "d": {"_delete_": True, "e": 5}, "f": 1}, inherited) == []


@pytest.mark.parametrize("path", RUNS, ids=relative)
def test_config_loads_and_its_model_builds(path):
    from piip_scale.tasks.kinds import build_model

    with torch.device("meta"):
        model = build_model(load_config(path), num_classes=3)
    assert set(model.parameter_rules()) == {name for name, _ in model.named_parameters()}
