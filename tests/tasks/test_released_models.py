"""Whole released models: mmlab's own detectors, written as the released code's versions of mmlab write them."""

from __future__ import annotations

import json

import pytest
import torch
from old_layout import (
    CLASSES,
    backbone_of,
    network_weights,
    released,
    run_of,
    their_segmentor,
    theirs,
    write_run,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_detectors import SMALL, two_image_batch
from small_segmentors import batch_of
from typer.testing import CliRunner

from piip_scale.cli.app import app
from piip_scale.errors import ConfigError, ModelError
from piip_scale.models.official import from_official
from piip_scale.tasks.detection.mask_results import encode_masks
from piip_scale.tasks.detection.samples import data_samples
from piip_scale.tasks.kinds import load_model
from piip_scale.tasks.pixels import network_input

EPS = {"bbox_head.type": "ReferenceEpsDINOHead", "bbox_head.reference_eps": 1e-5}
OVERRIDES = SMALL | {"dino": SMALL["dino"] | EPS}
SEGMENTOR = {"decode_head.channels": 16, "auxiliary_head.channels": 16}
WRAPPED = {
    "mask_rcnn": lambda weights: {"state_dict": weights, "meta": {"CLASSES": CLASSES, "epoch": 12, "time": "now"}},
    "cascade_mask_rcnn": lambda weights: {"model": weights},
    "dino": lambda weights: {
        "module": {f"module.{name}": value for name, value in weights.items()},
        "ds_version": "0.8",
    },
}


def imported(folder, kind, weights, overrides, *more):
    torch.save(weights, folder / "released.pth")
    config = write_run(folder / "run.py", kind, overrides)
    arguments = [folder / "released.pth", "--config", config, "--out", folder / "whole.safetensors", *more]
    return CliRunner().invoke(app, ["weights", "import", *map(str, arguments)])


def features_of(kind, batch, augment):
    network = from_official(backbone_of(kind), network_weights(kind))
    with torch.no_grad():
        return network(network_input(batch, augment.mean, augment.std))


@pytest.mark.parametrize("kind", WRAPPED)
def test_a_released_detector_finds_here_what_mmdets_own_finds(tmp_path, kind):
    model, batch = theirs(kind), two_image_batch()
    result = imported(tmp_path, kind, WRAPPED[kind](released(kind, model)), OVERRIDES[kind])
    assert result.exit_code == 0, result.exception
    run = run_of(kind, OVERRIDES[kind], CLASSES)
    ours = load_model(run, tmp_path / "whole.safetensors").predict(batch)
    features = features_of(kind, batch, run.data.augment)
    with torch.no_grad():
        expected = model(features, data_samples(batch, with_masks=False), mode="predict")
    for found, sample in zip(ours, expected, strict=True):
        wanted = sample.pred_instances
        order = wanted.scores.argsort(descending=True, stable=True)
        assert len(found.scores) > 5
        assert torch.equal(found.labels, wanted.labels[order])
        torch.testing.assert_close(found.scores, wanted.scores[order])
        torch.testing.assert_close(found.boxes_xyxy_px, wanted.bboxes[order], atol=1e-3, rtol=1e-4)
        if "masks" in wanted:
            assert found.masks_rle == encode_masks(wanted.masks[order])


def test_a_released_segmentor_scores_here_what_mmsegs_own_scores(tmp_path):
    model, batch = their_segmentor(), batch_of(2, size_px=(128, 128), stored_px=(128, 128))
    weights = {"state_dict": released("upernet", model), "meta": {"CLASSES": list(CLASSES), "PALETTE": [[1, 2, 3]]}}
    assert imported(tmp_path, "upernet", weights, SEGMENTOR).exit_code == 0
    run = run_of("upernet", SEGMENTOR, CLASSES)
    ours = load_model(run, tmp_path / "whole.safetensors")
    features = features_of("upernet", batch, run.data.augment)
    with torch.no_grad():
        torch.testing.assert_close(ours.heads(*features), model.decode_head(features))
        expected = model.decode_head(features)
    wide = torch.nn.functional.interpolate(expected, (128, 128), mode="bilinear", align_corners=False)
    for found, scores in zip(ours.predict(batch), wide, strict=True):
        assert torch.equal(found.labels_HW, scores.argmax(0).byte())
    # The auxiliary head has no part in a prediction, and a training goes on from it.
    for name, value in model.auxiliary_head.state_dict().items():
        assert torch.equal(ours.heads.heads.auxiliary_head.state_dict()[name], value)


@pytest.mark.parametrize("kind", ["mask_rcnn", "dino", "upernet"])
def test_what_is_exported_is_what_was_imported_bit_for_bit(tmp_path, kind):
    model = their_segmentor() if kind == "upernet" else theirs(kind)
    weights = released(kind, model)
    overrides = SEGMENTOR if kind == "upernet" else OVERRIDES[kind]
    assert imported(tmp_path, kind, {"state_dict": weights, "meta": {"CLASSES": CLASSES}}, overrides).exit_code == 0
    config = write_run(tmp_path / "named.py", kind, overrides, CLASSES)
    exported(tmp_path / "back.pth", config, tmp_path / "whole.safetensors")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert tuple(back["meta"]["CLASSES"]) == CLASSES
    assert back["state_dict"].keys() == weights.keys()
    for name, value in weights.items():
        assert back["state_dict"][name].shape == value.shape, name
        assert back["state_dict"][name].dtype == value.dtype, name
        assert torch.equal(back["state_dict"][name], value), name
    again = imported(tmp_path, kind, back, overrides, "--overwrite")
    assert again.exit_code == 0
    exported(tmp_path / "again.safetensors", config, tmp_path / "whole.safetensors")
    assert all(torch.equal(value, weights[name]) for name, value in load_file(tmp_path / "again.safetensors").items())
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def exported(out, config, *weights):
    result = CliRunner().invoke(app, ["weights", "export", str(config), *map(str, weights), "--out", str(out)])
    assert result.exit_code == 0, result.exception
    return result


def test_an_export_that_cannot_be_leaves_what_was_there(tmp_path):
    config = write_run(tmp_path / "run.py", "mask_rcnn", SMALL["mask_rcnn"], CLASSES)
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    for out, words in (
        ("x.bin", ".pth or .safetensors"),
        ("run.py", ".pth or .safetensors"),
        ("x.pth", "1 unexpected (a)"),
    ):
        arguments = ["weights", "export", config, tmp_path / "other.safetensors", "--out", tmp_path / out]
        result = CliRunner().invoke(app, list(map(str, arguments)))
        assert isinstance(result.exception, ModelError)
        assert words in result.exception.line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.safetensors", "run.py"]


def test_what_is_imported_says_its_classes_and_keeps_its_dtypes(tmp_path):
    model = theirs("mask_rcnn")
    weights = {name: value.bfloat16() for name, value in released("mask_rcnn", model).items()}
    result = imported(tmp_path, "mask_rcnn", WRAPPED["mask_rcnn"](weights), SMALL["mask_rcnn"])
    assert f"of 3 classes, {sum(value.numel() for value in weights.values()):,} parameters" in result.output
    with safe_open(tmp_path / "whole.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["classes"]) == list(CLASSES)
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118 - not a dict


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda weights: weights.pop("rpn_head.rpn_cls.bias"), "1 missing (heads.detector.rpn_head.rpn_cls.bias)"),
        (lambda weights: weights.update({"roi_head.iou.bias": torch.zeros(2)}), "1 unexpected (roi_head.iou.bias)"),
        (lambda weights: weights.update({"neck.fpn_convs.0.conv.bias": torch.zeros(5)}), "conv.bias [5] for [32]"),
        (
            lambda weights: weights.update({"backbone.fpn9.weight": torch.zeros(2)}),
            "1 unexpected (backbone.fpn9.weight)",
        ),
        (lambda weights: weights.update({"roi_head.bbox_head.fc_cls.bias": torch.zeros(9)}), "fc_cls.bias [9] for"),
    ],
)
def test_what_has_no_place_is_told_in_one_line_and_leaves_no_file(tmp_path, change, words):
    weights = released("mask_rcnn", theirs("mask_rcnn"))
    change(weights)
    result = imported(tmp_path, "mask_rcnn", weights, SMALL["mask_rcnn"])
    assert isinstance(result.exception, ModelError)
    assert words in result.exception.line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["released.pth", "run.py"]


def test_another_detectors_config_and_other_classes_are_refused(tmp_path):
    weights = WRAPPED["mask_rcnn"](released("mask_rcnn", theirs("mask_rcnn")))
    assert "are not this config's model" in imported(tmp_path, "dino", weights, SMALL["dino"]).exception.line
    more = ["--set", 'data.classes=["box","disc","star"]']
    line = imported(tmp_path, "mask_rcnn", weights, SMALL["mask_rcnn"], *more).exception.line
    assert "the same in another order" in line


def test_a_detector_or_a_network_is_asked_for(tmp_path):
    for options in ([], ["--config", "a.py", "--backbone", "b.json"]):
        result = CliRunner().invoke(
            app, ["weights", "import", "x.pth", "--out", str(tmp_path / "o.safetensors"), *options]
        )
        assert isinstance(result.exception, ConfigError)
        assert "--config or --backbone" in result.exception.line


def test_references_near_the_border_are_cut_off_where_the_released_code_does():
    from piip_scale.tasks.detection.dino_head import ReferenceEpsDINOHead
    from piip_scale.tasks.mmlab import DINOHead

    loss = {"type": "FocalLoss", "use_sigmoid": True}
    told = {"num_classes": 3, "as_two_stage": True, "num_pred_layer": 3, "loss_cls": loss}
    torch.manual_seed(0)
    mmdets, same, released_one = (
        head(**told, **more)
        for head, more in (
            (DINOHead, {}),
            (ReferenceEpsDINOHead, {"reference_eps": 1e-5}),
            (ReferenceEpsDINOHead, {}),
        )
    )
    for head in (same, released_one):
        head.load_state_dict(mmdets.state_dict())
    states, references = torch.randn(2, 1, 6, 256), [torch.rand(1, 6, 4) * 0.9 + 0.05 for _ in range(3)]
    for head in (same, released_one):
        for found, expected in zip(head(states, references), mmdets(states, references), strict=True):
            assert torch.equal(found, expected)
    references[1][0, 0] = torch.tensor([1e-7, 0.9999, 1e-4, 0.5])
    expected = mmdets(states, references)[1]
    assert torch.equal(same(states, references)[1], expected)
    # By hand: log(x / (1 - x)) with both bounded below by 1e-3.
    logits = torch.tensor([1e-3 / 1.0, 0.9999 / 1e-3, 1e-3 / 0.9999, 1.0]).log()
    by_hand = (mmdets.reg_branches[1](states[1])[0, 0] + logits).sigmoid()
    torch.testing.assert_close(released_one(states, references)[1][1, 0, 0], by_hand, atol=1e-6, rtol=1e-5)
    assert (by_hand / expected[1, 0, 0])[:3].sub(1).abs().min() > 5e-4
