"""The configs of ImageNet are the released recipes: networks, optimiser, schedule, images."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from released import there_and_back

from piip_scale.config import load_config
from piip_scale.models.official_config import read_official_config
from piip_scale.models.official_keys import official_name
from piip_scale.tasks.kinds import build_model

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT.parent / "shared" / "reference"
RELEASED = {
    "augreg_sbl_320_160_96": "piip_3branch_sbl_320-160-96_cls_token_augreg",
    "augreg_sbl_384_192_128": "piip_3branch_sbl_384-192-128_cls_token_augreg",
    "deit_tsb_368_192_128": "piip_3branch_tsb_368-192-128_cls_token_deit1",
}
IMAGES_OF_IMAGENET = 1_281_167


def config_of(name):
    return load_config(ROOT / "configs" / "imagenet" / f"{name}.py")


def released_path(name):
    return f"classification/configs/{RELEASED[name]}.py"


def read(file):
    if not REFERENCE.is_dir():
        pytest.skip(f"the reference material is not beside the checkout ({REFERENCE.parent.name}/{REFERENCE.name})")
    return json.loads((REFERENCE / file).read_text())


@pytest.fixture(scope="module")
def recipes():
    return {row["config"]: row for row in read("piip_recipes.json") if row["task"] == "classification"}


def command_line(recipe):
    """The released command's options; those without a value are true."""
    words = recipe["train_cli_readme"].split(",")[0].split()
    follows = [*words[1:], "--"]
    return {
        word: True if after.startswith("--") else float(after)
        for word, after in zip(words, follows, strict=True)
        if word.startswith("--")
    }


def test_there_is_a_config_for_every_recipe_and_a_recipe_for_every_config(recipes):
    assert {path.stem for path in (ROOT / "configs" / "imagenet").glob("*.py")} == set(RELEASED)
    assert {released_path(name) for name in RELEASED} == set(recipes)


@pytest.mark.parametrize("name", sorted(RELEASED))
def test_network_is_the_released_one(name, recipes):
    backbone, run = read("released_backbones.json")[released_path(name)], config_of(name)
    official = read_official_config(backbone)
    ours = run.model.model_dump()
    files = [Path(branch.pop("pretrained")).name for branch in ours["branches"]]
    theirs = official.config.model_dump()
    for index, branch in enumerate(ours["branches"]):
        branch["blocks_per_stage"] = run.model.geometry.blocks_per_stage[index]
        theirs["branches"][index].pop("pretrained")
    assert ours == theirs
    assert run.classifier.separate == official.head.separate
    given = recipes[released_path(name)]["branches_low_to_high_res"]
    assert files == [Path(branch["pretrained"]).name for branch in given]
    assert [branch["resolution_px"] for branch in ours["branches"]] == [branch["img_size"] for branch in given]


@pytest.mark.parametrize("name", sorted(RELEASED))
def test_model_builds_and_every_parameter_has_a_released_name(name):
    official = read_official_config(read("released_backbones.json")[released_path(name)])
    with torch.device("meta"):
        model = build_model(config_of(name), official.head.num_classes)
    names = [parameter for parameter, _ in model.named_parameters()]
    assert set(model.parameter_rules()) == set(names)
    assert len({official_name(parameter, official) for parameter in names}) == len(names)
    there_and_back(model)
    branches = sum(p.numel() for n, p in model.named_parameters() if n.startswith("branches."))
    fresh = {n for n, rule in model.parameter_rules().items() if rule.fresh}
    assert sum(p.numel() for n, p in model.named_parameters() if n not in fresh) == branches
    assert {n.split(".")[0] for n in fresh} == {"interactions", "head"}


@pytest.mark.parametrize("name", sorted(RELEASED))
def test_optimiser_schedule_and_images_are_the_recipes(name, recipes):
    """What the command does not say is DeiT's default, which the released script keeps; see `configs/_base_`."""
    config, said = config_of(name), command_line(recipes[released_path(name)])
    optimizer, data, augment = config.optimizer, config.data, config.data.augment
    # With groups of its own the released script decays everything, and --unscale-lr takes the rate as it is.
    assert said["--unscale-lr"]
    assert (optimizer.lr, optimizer.weight_decay) == (said["--lr"], said["--weight-decay"])
    assert optimizer.fresh_lr_ratio == said["--from_scratch_lr_ratio"]
    assert (optimizer.lr_scaling, optimizer.decay_all, optimizer.layer_decay) == ("none", True, 1.0)
    assert (optimizer.betas, optimizer.clip_grad_norm) == ((0.9, 0.999), 0.0)

    gpus = 8
    assert f"{gpus} GPUs" in recipes[released_path(name)]["train_cli_readme"]
    assert (data.micro_batch_size, config.train.images_per_step) == (said["--batch-size"], gpus * said["--batch-size"])
    steps = IMAGES_OF_IMAGENET // config.train.images_per_step
    assert (config.train.epochs, config.train.evaluate_every_steps) == (said["--epochs"], steps)
    assert (config.schedule.kind, config.schedule.warmup_steps) == ("cosine", 5 * steps)
    assert config.schedule.warmup_ratio * optimizer.lr == pytest.approx(1e-6)
    assert config.schedule.final_ratio * optimizer.lr == pytest.approx(1e-5)

    assert augment.erase_probability == said["--reprob"]
    assert said["--no-repeated-aug"]
    assert (augment.auto_augment, augment.interpolation) == ("rand-m9-mstd0.5-inc1", "bicubic")
    assert (augment.mix.mixup_alpha, augment.mix.cutmix_alpha) == (0.8, 1.0)
    assert (augment.mix.probability, augment.mix.switch_probability) == (1.0, 0.5)
    assert (config.classifier.label_smoothing, augment.eval_crop_share) == (0.1, 1.0)


def test_images_are_normalised_as_timm_does_by_default():
    from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    augment = config_of("deit_tsb_368_192_128").data.augment
    for ours, theirs in ((augment.mean, IMAGENET_DEFAULT_MEAN), (augment.std, IMAGENET_DEFAULT_STD)):
        assert all(math.isclose(a / 255, b, rel_tol=1e-9) for a, b in zip(ours, theirs, strict=True))
