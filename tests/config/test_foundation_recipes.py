"""The configs around foundation models build, and a frozen giant's plans stay below 40 GiB on one GPU."""

from functools import partial

import pytest
import torch
from released import ROOT
from sections.foundation_plans import rows

from piip_scale.config import load_config
from piip_scale.data.reading.opened import OpenedSets
from piip_scale.engine.planning.planner import Planner
from piip_scale.tasks.counting import count_run, likely_classes
from piip_scale.tasks.kinds import build_model
from piip_scale.tasks.outline import outline_run

GIB = 2**30
CONFIGS = {path.stem: path for path in sorted((ROOT / "configs" / "foundation").glob("*.py"))}
GIANTS_B = {"internvit_6b": (5.8, 6.0), "h6b": (5.8, 6.0), "dinov3_7b": (6.6, 6.8), "dinov3_bs": (0.08, 0.09)}
GIANTS_B |= {"dinov3_l": (0.3, 0.31), "siglip2_b": (0.08, 0.09), "radio_b": (0.09, 0.1)}
"""Billions of parameters of the first branch, by what a config is named after."""
CLASSES = {"lvis": 1203, "objects365_1024": 365, "upernet": 150}
ONE_24_GB = [name for name, path in CONFIGS.items() if "one GPU of 24 GB" in path.read_text().splitlines()[0]]


def test_there_is_a_recipe_for_each_way_and_each_head():
    for head, size in (("mask_rcnn", "1024_512"), ("dino", "1024_512"), ("upernet", "512_256")):
        assert {f"{head}_dinov3_7b{way}_ct_{size}" for way in ("", "_frozen", "_lora")} <= CONFIGS.keys()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_recipe_builds_with_the_giant_that_it_names(name):
    config = load_config(CONFIGS[name])
    with torch.device("meta"):
        model = build_model(config, likely_classes(config, OpenedSets())[1])
    giant = model.backbone.branches[0]
    size_b = sum(p.numel() for p in giant.parameters()) / 1e9
    low, high = next(sizes for key, sizes in GIANTS_B.items() if key in name)
    assert low < size_b < high
    counted = count_run(config, 256, 256)
    assert counted.num_classes == next((number for key, number in CLASSES.items() if key in name), 80)
    assert sum(part.parameters for part in counted.parts) == sum(p.numel() for p in model.parameters())
    trained = {part for part, p in giant.named_parameters() if p.requires_grad}
    if "_frozen_" in name:
        assert not trained
    if "_lora_" in name:
        assert trained
        assert all(".lora." in part for part in trained)


@pytest.mark.parametrize(
    ("name", "gpu_gib", "most_gib"),
    [
        ("mask_rcnn_dinov3_7b_frozen_ct_1024_512", 80, 40),
        ("mask_rcnn_dinov3_bs_ct_1024_672_448", 24, 24),
        *(pytest.param(name, 24, 24, marks=pytest.mark.slow) for name in ONE_24_GB),
    ],
)
def test_what_is_made_for_one_gpu_plans_to_fit_it(name, gpu_gib, most_gib):
    config = load_config(CONFIGS[name])
    outline = partial(outline_run, num_classes=likely_classes(config, OpenedSets())[1], size_px=None)
    plan = Planner(outline, gpu_gib * GIB).plan(config, 1)
    assert plan.fits
    assert plan.total < most_gib * GIB


@pytest.mark.parametrize(
    "name",
    [
        "mask_rcnn_dinov3_7b_frozen_ct_1024_512",
        "dino_dinov3_7b_frozen_ct_1024_512",
        "upernet_radio_b_ct_512_256",
        *(pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS),
    ],
)
def test_the_recorded_plans_are_those_of_today(name):
    """Else ``python benchmarks/foundation.py --record``."""
    recorded = (ROOT / "docs" / "foundation.md").read_text().splitlines()
    assert f"| {' | '.join(rows([CONFIGS[name]])[0])} |" in recorded


def test_coco_starts_from_objects365_but_for_the_layers_of_the_classes():
    shapes = []
    for name in ("objects365", "objects365_coco"):
        config = load_config(CONFIGS[f"dino_dinov3_bs_ct_{name}_1024_672_448"])
        with torch.device("meta"):
            state = build_model(config, likely_classes(config, OpenedSets())[1]).state_dict()
        shapes.append({name: tensor.shape for name, tensor in state.items()})
    assert config.model.reset == ("classes",)
    assert shapes[0].keys() == shapes[1].keys()
    apart = {name for name, shape in shapes[0].items() if shape != shapes[1][name]}
    layers = {name.removeprefix("heads.detector.").rsplit(".", 2)[0] for name in apart}
    assert layers == {"bbox_head.cls_branches", "dn_query_generator"}
