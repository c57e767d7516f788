"""Every config that ships loads, and every detector in it builds; test_recipes.py does the same for COCO's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from piip_scale.config import load_config

CONFIGS = Path(__file__).parents[2] / "configs"
RUNS = sorted(path for path in CONFIGS.rglob("*.py") if not {"_base_", "coco"} & set(path.parts))


def test_there_are_configs():
    assert {"digits.py", "boxes.py", "masks.py"} <= {path.name for path in RUNS}


@pytest.mark.parametrize("path", RUNS, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_config_loads_and_its_model_builds(path):
    from piip_scale.tasks.detectors import build_detection_model

    config = load_config(path)
    with torch.device("meta"):
        model = build_detection_model(config, num_classes=3)
    assert set(model.parameter_rules()) == {name for name, _ in model.named_parameters()}
