"""The configs of COCO detection are the released recipes: networks, optimisers, schedules, images, heads."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from released import ROOT, expanded, given_branches, read, there_and_back

from piip_scale.config import load_config
from piip_scale.config.branches import ConvNextBranchConfig
from piip_scale.models.official_config import read_official_config

RELEASED = {
    "dino_h6b_1024_768": "2branch/dino_4scale_internvit_h6b_1024_768_fpn_1x_coco_bs32_ms",
    "mask_rcnn_h6b_1024_512": "2branch/mask_rcnn_internvit_h6b_1024_512_fpn_1x_coco_bs16_ms",
    "mask_rcnn_h6b_1024_512_speedup": "2branch/mask_rcnn_internvit_h6b_1024_512_fpn_1x_coco_bs16_ms_speedup",
    "dino_deit_384_sbl_1792_1120_672": "3branch/dino_4scale_deit_384_sbl_1792_1120_672_fpn_3x_coco_bs32_ms",
    "dino_lh6b_1536_1024_512": "3branch/dino_4scale_internvit_lh6b_1536_1024_512_fpn_2x_coco_bs32_ms",
    "mask_rcnn_lh6b_1536_1024_512": "3branch/mask_rcnn_internvit_lh6b_1536_1024_512_fpn_1x_coco_bs32_ms",
    "mask_rcnn_augreg_sbl_1568_1120_672": "3branch/mask_rcnn_augreg_sbl_1568_1120_672_fpn_1x_coco_bs16",
    "mask_rcnn_augreg_sbl_1568_1120_672_speedup": "3branch/mask_rcnn_augreg_sbl_1568_1120_672_fpn_1x_coco_bs16_speedup",
    "mask_rcnn_beit_sbl_1568_1120_672": "3branch/mask_rcnn_beit_sbl_1568_1120_672_fpn_1x_coco_bs16",
    "mask_rcnn_dinov2_sbl_1568_1120_672": "3branch/mask_rcnn_dinov2_sbl_1568_1120_672_fpn_1x_coco_bs16",
    "mask_rcnn_mae_sbl_1568_1120_672": "3branch/mask_rcnn_mae_sbl_1568_1120_672_fpn_1x_coco_bs16",
    "mask_rcnn_uniperceiver_sbl_1568_1120_672": "3branch/mask_rcnn_uniperceiver_sbl_1568_1120_672_fpn_1x_coco_bs16",
    "mask_rcnn_deit_sbl_1120_672_448": "3branch/mask_rcnn_deit_sbl_1120_672_448_fpn_1x_coco_bs16",
    "mask_rcnn_deit_sbl_1344_896_448": "3branch/mask_rcnn_deit_sbl_1344_896_448_fpn_1x_coco_bs16",
    "mask_rcnn_deit_sbl_1568_896_672": "3branch/mask_rcnn_deit_sbl_1568_896_672_fpn_1x_coco_bs16",
    "mask_rcnn_deit_sbl_1568_1120_672": "3branch/mask_rcnn_deit_sbl_1568_1120_672_fpn_1x_coco_bs16",
    "mask_rcnn_deit_tsb_1120_896_448": "3branch/mask_rcnn_deit_tsb_1120_896_448_fpn_1x_coco_bs16",
    "mask_rcnn_deit_tsb_1568_896_448": "3branch/mask_rcnn_deit_tsb_1568_896_448_fpn_1x_coco_bs16",
    "mask_rcnn_deit_tsb_1568_1120_672": "3branch/mask_rcnn_deit_tsb_1568_1120_672_fpn_1x_coco_bs16",
    "mask_rcnn_deit_tsbl_1344_896_672_448": "4branch/mask_rcnn_deit_tsbl_1344_896_672_448_fpn_1x_coco_bs16",
    "mask_rcnn_deit_tsbl_1568_1120_672_448": "4branch/mask_rcnn_deit_tsbl_1568_1120_672_448_fpn_1x_coco_bs16",
    "mask_rcnn_deit_tsbl_1792_1568_1120_448": "4branch/mask_rcnn_deit_tsbl_1792_1568_1120_448_fpn_1x_coco_bs16",
    "mask_rcnn_convnext_b_1024": "baseline/mask_rcnn_convnext-base_1024_regular-fpn",
    "mask_rcnn_deit_b_1024": "baseline/mask_rcnn_deit_vit_b_fpn_1x_coco_bs16",
    "mask_rcnn_deit_l_1024": "baseline/mask_rcnn_deit_vit_l_fpn_1x_coco_bs16",
    "mask_rcnn_internvit_6b_1024": "baseline/mask_rcnn_internvit_6b_fpn_1x_coco_bs16_ms",
    "mask_rcnn_ct_cs_cb_1024_672_448": "convnext/mask_rcnn_convnext-tsb_1024_672_448_regular-fpn",
    "mask_rcnn_ct_vs_vb_1024_672_448": "convnext/mask_rcnn_convnext-t_vit-s_vit-b_1024_672_448_regular-fpn",
    "mask_rcnn_ct_cs_vb_1024_672_448": "convnext/mask_rcnn_convnext-t_convnext-s_vit-b_1024_672_448_regular-fpn",
    "mask_rcnn_ct_vs_cb_1024_672_448": "convnext/mask_rcnn_convnext-t_vit-s_convnext-b_1024_672_448_regular-fpn",
    "mask_rcnn_vt_cs_vb_1024_672_448": "convnext/mask_rcnn_vit-t_convnext-s_vit-b_1024_672_448_regular-fpn",
    "mask_rcnn_vt_cs_cb_1024_672_448": "convnext/mask_rcnn_vit-t_convnext-s_convnext-b_1024_672_448_regular-fpn",
    "mask_rcnn_vt_vs_cb_1024_672_448": "convnext/mask_rcnn_vit-t_vit-s_convnext-b_1024_672_448_regular-fpn",
}
NAMES = sorted(RELEASED)
IMAGES_OF_COCO = 118_287
NUM_CLASSES = 80


@cache
def config_of(name):
    return load_config(ROOT / "configs" / "coco" / f"{name}.py")


@cache
def meta_model_of(name):
    from piip_scale.tasks.detection.model import build_detection_model

    with torch.device("meta"):
        return build_detection_model(config_of(name), num_classes=NUM_CLASSES)


def released_path(name):
    return f"mmdetection/configs/piip/{RELEASED[name]}.py"


@pytest.fixture(scope="module")
def recipes():
    return {row["config"]: row for row in read("piip_recipes.json") if row["task"] == "mmdetection"}


@pytest.fixture(scope="module")
def backbones():
    return read("released_backbones.json")


@pytest.fixture(scope="module")
def parameter_counts():
    return read("official_parameter_counts.json")


def test_there_is_a_config_for_every_recipe_and_a_recipe_for_every_config(recipes):
    assert {path.stem for path in (ROOT / "configs" / "coco").glob("*.py")} == set(RELEASED)
    assert {released_path(name) for name in RELEASED} == set(recipes)


def test_published_rows_have_the_resolutions_of_their_names(recipes):
    name_of = {released_path(name): name for name in RELEASED}
    rows = [row for row in read("piip_tables.json") if row["config"] in name_of]
    assert len(rows) >= 31
    for row in rows:
        name, sizes = name_of[row["config"]], row["resolution_high_to_low"]
        branches = config_of(name).model.branches
        assert [branch.resolution_px for branch in reversed(branches)] == sizes
        assert "_".join(map(str, sizes)) in name


@pytest.mark.parametrize("name", NAMES)
def test_config_loads_and_its_detector_builds(name):
    model = meta_model_of(name)
    assert set(model.parameter_rules()) == {parameter for parameter, _ in model.named_parameters()}
    there_and_back(model)


@pytest.mark.parametrize("name", NAMES)
def test_network_is_the_released_one(name, backbones):
    ours, backbone = config_of(name).model, backbones[released_path(name)]
    assert expanded(ours) == expanded(read_official_config(backbone).config)
    files = [Path(branch["pretrained"]).name for branch in given_branches(backbone)]
    assert [Path(branch.pretrained).name for branch in ours.branches] == files


@pytest.mark.parametrize("name", NAMES)
def test_optimiser_and_schedule_are_the_recipes(name, recipes):
    config, recipe = config_of(name), recipes[released_path(name)]
    theirs, ours = recipe["optimizer"], config.optimizer
    assert theirs["type"] == "AdamW"
    assert (ours.lr, ours.betas, ours.weight_decay) == (theirs["lr"], tuple(theirs["betas"]), theirs["weight_decay"])
    assert ours.layer_decay == theirs.get("paramwise_cfg", {}).get("layer_decay_rate", 1.0)
    # torch's plain AdamW lets everything decay; the released constructor spares norms and biases.
    assert ours.decay_all == ("constructor" not in theirs)
    assert ours.clip_grad_norm == (recipe["optimizer_config"]["grad_clip"] or {"max_norm": 0})["max_norm"]

    rates, epochs = recipe["lr_config"], recipe["runner"]["max_epochs"]
    assert config.train.epochs == epochs
    assert (config.schedule.kind, rates["warmup"]) == (rates["policy"], "linear")
    assert config.schedule.warmup_steps == rates["warmup_iters"]
    assert config.schedule.warmup_ratio == rates["warmup_ratio"]
    assert [share * epochs for share in config.schedule.milestones] == pytest.approx(rates["step"])
    assert config.schedule.gamma == 0.1  # mmcv's own, which no recipe changes

    assert recipe["precision"].startswith("backbone bf16")
    assert (config.train.precision, config.zero.stage) == ("bf16", 3)
    gpus, images = recipe["gpus_x_images_comment"] or (8, recipe["samples_per_gpu"])
    assert (config.data.micro_batch_size, config.train.images_per_step) == (images, gpus * images)
    assert config.train.evaluate_every_steps == IMAGES_OF_COCO // (gpus * images)


@pytest.mark.parametrize("name", NAMES)
def test_images_are_the_recipes(name, recipes):
    augment, recipe = config_of(name).data.augment, recipes[released_path(name)]
    steps = [step for step in recipe["train_geometry"] if step["type"] != "RandomFlip"]
    kinds = [step["type"] for step in steps]
    scales = [step["img_scale"] for step in steps if "img_scale" in step]
    crops = [tuple(step["crop_size"]) for step in steps if "crop_size" in step]
    assert len(steps) == len(recipe["train_geometry"]) - 1
    assert augment.flip_probability == 0.5
    if len(steps) == 2:
        assert kinds == ["Resize", "Pad"]
        assert (max(scales[0]), (min(scales[0]),)) == (augment.max_edge_px, augment.short_edge_px)
        assert (augment.crop_first, augment.crop_px) == (None, None)
    else:
        # One way, then the other in three steps, and what follows both.
        assert kinds == ["Resize", "Resize", "RandomCrop", "Resize", "RandomCrop", "Pad"]
        assert scales[0] == scales[2] == [[size, augment.max_edge_px] for size in augment.short_edge_px]
        first = augment.crop_first
        assert scales[1] == [[size, augment.max_edge_px] for size in first.short_edge_px]
        assert crops == [first.crop_range_px, augment.crop_px]
        assert (first.probability, augment.recompute_boxes) == (0.5, False)
    assert augment.jitter_scale is None
    assert steps[-1]["size_divisor"] == augment.pad_multiple_px
    evaluation = recipe["test_geometry"]
    assert sorted(evaluation[0]["img_scale"]) == [augment.short_edge_px[-1], augment.max_edge_px]
    assert evaluation[-1]["size_divisor"] == augment.pad_multiple_px
    normal = recipe["img_norm_cfg"]
    assert (augment.mean, augment.std) == (tuple(normal["mean"]), tuple(normal["std"]))
    assert normal["to_rgb"]


@pytest.mark.parametrize("name", NAMES)
def test_detector_has_the_recipes_neck_and_head(name, recipes):
    from piip_scale.tasks.detection.heads_config import plan_detector
    from piip_scale.tasks.mmlab import MODELS

    recipe, model = recipes[released_path(name)], meta_model_of(name)
    plan = plan_detector(config_of(name).detector, model.backbone.feature_specs, NUM_CLASSES).model
    assert issubclass(MODELS.get(plan["type"]), MODELS.get(recipe["detector"]))
    assert {key: plan["neck"].get(key) for key in recipe["neck"]} == recipe["neck"]
    head = recipe.get("bbox_head")
    assert (head is not None) == (recipe["detector"] == "DINO")
    if head is not None:
        assert plan["num_queries"] == head["num_query"]
        assert plan["dn_cfg"]["group_cfg"] == head["dn_cfg"]["group_cfg"]
        assert plan["dn_cfg"]["label_noise_scale"] == head["dn_cfg"]["noise_scale"]["label"]
        assert plan["dn_cfg"]["box_noise_scale"] == head["dn_cfg"]["noise_scale"]["box"]
        assert plan["bbox_head"]["num_classes"] == head["num_classes"]
        assert plan["test_cfg"] == head["test_cfg"]
        assert plan["as_two_stage"] == head["as_two_stage"]
        assert plan["with_box_refine"] == head["with_box_refine"]


@pytest.mark.parametrize("name", [name for name in NAMES if "convnext" not in RELEASED[name]])
def test_backbone_has_the_released_number_of_parameters(name, parameter_counts):
    released = parameter_counts[released_path(name)]
    branches = config_of(name).model.branches
    # The released three-branch class builds the level that DINO leaves out: two doublings and a norm, never called.
    width = branches[0].embed_dim if len(branches) == 3 and name.startswith("dino") else 0
    unused = 2 * (4 * width**2 + width) + 2 * width
    assert sum(p.numel() for p in meta_model_of(name).backbone.parameters()) == released["total"] - unused


@pytest.mark.parametrize(
    "name",
    [
        "dino_deit_384_sbl_1792_1120_672",
        "dino_h6b_1024_768",
        "mask_rcnn_ct_vs_cb_1024_672_448",
        "mask_rcnn_deit_tsbl_1344_896_672_448",
        "mask_rcnn_internvit_6b_1024",
    ],
)
def test_every_parameter_is_counted(name):
    from piip_scale.tasks.counting import count_run

    counted = count_run(config_of(name), 1024, 1024)
    assert sum(part.parameters for part in counted.parts) == sum(p.numel() for p in meta_model_of(name).parameters())


@pytest.mark.parametrize("name", NAMES)
def test_layer_decay_follows_the_recipes_layers(name, recipes):
    model, settings = meta_model_of(name), recipes[released_path(name)]["optimizer"].get("paramwise_cfg")
    branches = config_of(name).model.branches
    vits = [index for index, branch in enumerate(branches) if not isinstance(branch, ConvNextBranchConfig)]
    rules = model.parameter_rules()
    if not vits:
        assert {rule.layer_id for rule in rules.values()} == {model.num_layers + 1}
        return
    assert model.num_layers == settings["num_layers"]
    strides = [1, *settings.get("skip_stride", [])]
    for index in vits:
        first = f"backbone.branches.{index}.blocks.0."
        ids = {rule.layer_id for parameter, rule in rules.items() if parameter.startswith(first)}
        assert ids == {strides[index]}
