"""The configs of ADE20K segmentation are the released recipes: networks, optimisers, schedules, images, heads."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from released import ROOT, expanded, given_branches, read, there_and_back

from piip_scale.config import load_config
from piip_scale.data.packing.pack_classes import read_class_names
from piip_scale.models.official_config import read_official_config
from piip_scale.tasks import mmcv_ext

H6B = {
    f"upernet_h6b_512_{size}": f"2branch/upernet_internvit_h6b_{size}_512_80k_ade20k_bs16_lr4e-5"
    for size in (192, 256, 384, 512)
}
RELEASED = H6B | {"upernet_internvit_6b_512": "baseline/upernet_internvit_6b_512_80k_ade20k_bs16_lr4e-5"}
FOLDER = ROOT / "configs" / "ade20k"
NAMES = sorted(RELEASED)
NUM_CLASSES = 150


@cache
def config_of(name):
    return load_config(FOLDER / f"{name}.py")


@cache
def meta_model_of(name):
    from piip_scale.tasks.segmentation.model import build_segmentation_model

    with torch.device("meta"):
        return build_segmentation_model(config_of(name), NUM_CLASSES)


def released_path(name):
    return f"mmsegmentation/configs/piip/{RELEASED[name]}.py"


@pytest.fixture(scope="module")
def recipes():
    return {row["config"]: row for row in read("piip_recipes.json") if row["task"] == "mmsegmentation"}


def test_there_is_a_config_for_every_recipe_and_a_recipe_for_every_config(recipes):
    assert {path.stem for path in FOLDER.glob("*.py")} == set(RELEASED)
    assert {released_path(name) for name in RELEASED} == set(recipes)


def test_class_names_are_mmsegs():
    mmcv_ext.install()
    from mmseg.datasets import ADE20KDataset  # not before the stand-in for mmcv's compiled ops

    assert read_class_names(FOLDER / "class_names.txt") == tuple(
        name.strip() for name in ADE20KDataset.METAINFO["classes"]
    )


@pytest.mark.parametrize("name", NAMES)
def test_network_is_the_released_one(name):
    ours, backbone = config_of(name).model, read("released_backbones.json")[released_path(name)]
    assert expanded(ours) == expanded(read_official_config(backbone).config)
    files = [Path(branch["pretrained"]).name for branch in given_branches(backbone)]
    assert [Path(branch.pretrained).name for branch in ours.branches] == files


@pytest.mark.parametrize("name", NAMES)
def test_model_builds_with_the_recipes_heads(name, recipes):
    recipe, model = recipes[released_path(name)], meta_model_of(name)
    there_and_back(model)
    assert set(model.parameter_rules()) == {parameter for parameter, _ in model.named_parameters()}
    for key, weight, in_channels in (
        ("decode_head", 1.0, recipe["decode_head"]["in_channels"]),
        ("auxiliary_head", 0.4, recipe["auxiliary_head"]["in_channels"]),
    ):
        head, theirs = getattr(model.heads.heads, key), recipe[key]
        assert type(head).__name__ == theirs["type"]
        assert list(head.in_channels) == in_channels if key == "decode_head" else head.in_channels == in_channels
        assert (head.channels, head.num_classes) == (theirs["channels"], NUM_CLASSES)
        # mmseg's own values, which no recipe changes.
        assert (head.loss_decode.loss_weight, head.ignore_index, head.align_corners) == (weight, 255, False)
        assert isinstance(
            head.convs[0].norm if key == "auxiliary_head" else head.bottleneck.norm, torch.nn.SyncBatchNorm
        )
    assert recipe["decode_head"]["num_classes"] == NUM_CLASSES
    inference, theirs = config_of(name).segmentor.inference, recipe["test_cfg"]
    assert inference.mode == theirs["mode"] == "slide"
    assert [list(inference.crop_px), list(inference.stride_px)] == [theirs["crop_size"], theirs["stride"]]


@pytest.mark.parametrize("name", NAMES)
def test_optimiser_and_schedule_are_the_recipes(name, recipes):
    config, recipe = config_of(name), recipes[released_path(name)]
    theirs, ours = recipe["optimizer"], config.optimizer
    assert theirs["type"] == "AdamW"
    assert (ours.lr, ours.betas, ours.weight_decay) == (theirs["lr"], tuple(theirs["betas"]), theirs["weight_decay"])
    assert ours.layer_decay == theirs["paramwise_cfg"]["layer_decay_rate"]
    assert meta_model_of(name).num_layers == theirs["paramwise_cfg"]["num_layers"]
    assert (ours.decay_all, ours.clip_grad_norm, recipe["optimizer_config"]) == (False, 0, {})

    rates, schedule = recipe["lr_config"], config.schedule
    assert config.train.steps == recipe["runner"]["max_iters"]
    assert (schedule.kind, rates["warmup"]) == (rates["policy"], "linear")
    assert (schedule.warmup_steps, schedule.warmup_ratio) == (rates["warmup_iters"], rates["warmup_ratio"])
    assert (schedule.power, schedule.final_ratio * ours.lr) == (rates["power"], rates["min_lr"])

    assert recipe["precision"].startswith("backbone bf16")
    assert (config.train.precision, config.zero.stage) == ("bf16", 3)
    gpus, images = recipe["gpus_x_images_comment"]
    assert (config.data.micro_batch_size, config.train.images_per_step) == (images, gpus * images)
    assert config.train.images_per_step == recipe["ds_train_batch_size"]


@pytest.mark.parametrize("name", NAMES)
def test_layer_decay_follows_the_recipes_layers(name, recipes):
    settings, rules = recipes[released_path(name)]["optimizer"]["paramwise_cfg"], meta_model_of(name).parameter_rules()
    strides = [1, settings["skip_stride"]] if "skip_stride" in settings else [1]
    for index, stride in enumerate(strides):
        first = f"backbone.branches.{index}.blocks.0."
        assert {rule.layer_id for parameter, rule in rules.items() if parameter.startswith(first)} == {stride}


@pytest.mark.parametrize("name", NAMES)
def test_images_are_the_recipes(name, recipes):
    augment, recipe = config_of(name).data.augment, recipes[released_path(name)]
    resize, crop, flip, pad = recipe["train_geometry"]
    assert [step["type"] for step in (resize, crop, flip, pad)] == ["Resize", "RandomCrop", "RandomFlip", "Pad"]
    assert [augment.max_edge_px, augment.short_edge_px] == resize["img_scale"]
    assert list(augment.scale_range) == resize["ratio_range"]
    assert list(augment.crop_px) == crop["crop_size"] == pad["size"]
    assert augment.max_class_share == crop["cat_max_ratio"]
    # mmseg's ADE20K base recipe, which no released one changes in this.
    assert augment.flip_probability == 0.5
    assert augment.distortion.model_dump() == {
        "brightness": 32.0,
        "contrast": (0.5, 1.5),
        "saturation": (0.5, 1.5),
        "hue": 18,
    }
    assert recipe["test_geometry"][0]["img_scale"] == [augment.max_edge_px, augment.short_edge_px]
    normal = recipe["img_norm_cfg"]
    assert (augment.mean, augment.std, normal["to_rgb"]) == (tuple(normal["mean"]), tuple(normal["std"]), True)
