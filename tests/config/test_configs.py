"""Every config that ships loads, and its model builds; the tests of recipes do the same for the released ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from piip_scale.config import load_config

CONFIGS = Path(__file__).parents[2] / "configs"
RELEASED = {"_base_", "coco", "imagenet", "ade20k"}
RUNS = sorted(path for path in CONFIGS.rglob("*.py") if not RELEASED & set(path.parts))


def test_there_are_configs():
    assert {"digits.py", "boxes.py", "masks.py"} <= {path.name for path in RUNS}


@pytest.mark.parametrize("path", RUNS, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_config_loads_and_its_model_builds(path):
    from piip_scale.tasks.kinds import build_model

    with torch.device("meta"):
        model = build_model(load_config(path), num_classes=3)
    assert set(model.parameter_rules()) == {name for name, _ in model.named_parameters()}
