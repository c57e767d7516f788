"""A training starts from a whole model's file, with other classes or other heads as its config says."""

from __future__ import annotations

import json
import logging
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import small_detectors
import small_segmentors
import torch
from ranks import FORCED_RELEASE, run_ranks
from released_state import to_released
from safetensors.torch import save_file
from test_equality import weights_of

from piip_scale.config.loading import check_config, config_text
from piip_scale.engine.start_weights import check_start_weights, start_weights
from piip_scale.engine.zero.setup import build_engine
from piip_scale.errors import ConfigError, ModelError
from piip_scale.registry import row_of
from piip_scale.tasks.kinds import build_model

SIDE = {"kind": "vit", "depth": 2, "num_heads": 2, "patch_size_px": 8}
CLASSIFIER = {
    "task": "classification",
    "model": {
        "branches": [
            SIDE | {"resolution_px": 16, "pretrain_resolution_px": 16, "embed_dim": 64},
            SIDE | {"resolution_px": 32, "pretrain_resolution_px": 32, "embed_dim": 32},
        ],
        "interaction": {"num_stages": 2, "num_heads": 2},
    },
    "data": {"train_shards": "train", "val_shards": "val"},
    "train": {"steps": 1},
}
NAMES = ("disc", "box", "star")
TASKS = ("detection", "segmentation", "classification")
CLASS_LAYERS = {
    "detection": {f"heads.detector.roi_head.{part}" for part in ("bbox_head.fc_cls", "bbox_head.fc_reg")}
    | {"heads.detector.roi_head.mask_head.conv_logits"},
    "segmentation": {f"heads.heads.{part}.conv_seg" for part in ("decode_head", "auxiliary_head")},
    "classification": {"head.parts.0.linear", "head.parts.1.linear"},
}


def config_of(task, names=NAMES, *, pretrained=None, reset=(), **sections):
    made = {"detection": small_detectors.run_config, "segmentation": small_segmentors.run_config}
    values = made[task]().model_dump() if task in made else dict(CLASSIFIER)
    values["data"] = values["data"] | {"classes": names}
    values["model"] = values["model"] | {"pretrained": None if pretrained is None else str(pretrained), "reset": reset}
    return check_config(values | sections)


def model_of(config, device="meta"):
    """As a task builds it: the network without values."""
    torch.manual_seed(1)
    return row_of(config.task).load("model")(config, len(config.data.classes), network_device=device)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """Each task's model, trained so to speak, as `convert` writes it."""
    folder, found = tmp_path_factory.mktemp("converted"), {}
    for task in TASKS:
        config = config_of(task)
        torch.manual_seed(2)
        state = {
            name: torch.randn_like(value) if value.is_floating_point() else value + 7
            for name, value in build_model(config, 3).state_dict().items()
        }
        found[task] = folder / f"{task}.safetensors"
        save_file(state, found[task], metadata={"config": config_text(config)})
    return found


def content(path):
    from safetensors.torch import load_file

    return load_file(path)


@pytest.mark.parametrize("task", TASKS)
def test_a_file_of_ours_is_taken_whole(files, task):
    config = config_of(task, pretrained=files[task])
    model = model_of(config)
    found, expected = start_weights(model, config), content(files[task])
    assert found.notes == ()
    assert found.tensors.keys() == expected.keys() == model.state_dict().keys()
    assert all(torch.equal(found.tensors[name], value) for name, value in expected.items())


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("names", [("red", "white"), ("red", "white", "blue"), ("star", "disc", "box")])
def test_other_classes_are_refused_with_the_key_that_helps_and_that_key_does(files, task, names):
    config = config_of(task, names, pretrained=files[task])
    with pytest.raises(ModelError, match="was trained on other classes") as raised:
        check_start_weights(model_of(config), config)
    line = raised.value.line
    assert f"this run has {len(names)} ({', '.join(names)})" in line
    key = line.split("--set 'model.reset=")[1].split("'")[0]
    config = config_of(task, names, pretrained=files[task], reset=json.loads(key))
    found, expected = start_weights(model_of(config), config), content(files[task])
    afresh = expected.keys() - found.tensors.keys()
    assert {name.rpartition(".")[0] for name in afresh} == CLASS_LAYERS[task]
    assert all(torch.equal(value, expected[name]) for name, value in found.tensors.items())
    (note,) = found.notes
    assert (
        set(note.removeprefix("by model.reset the layers of the classes start afresh: ").split(", "))
        == CLASS_LAYERS[task]
    )


def test_another_number_of_classes_shows_without_names(files, tmp_path):
    save_file(content(files["detection"]), tmp_path / "nameless.safetensors")
    config = config_of("detection", ("red", "white"), pretrained=tmp_path / "nameless.safetensors")
    with pytest.raises(ModelError, match=r"other classes: got 3; this run has 2; add --set 'model.reset="):
        start_weights(model_of(config), config)
    same = config_of("detection", ("red", "white", "blue"), pretrained=tmp_path / "nameless.safetensors")
    assert start_weights(model_of(same), same).notes == ()


def test_heads_start_afresh_where_the_config_says_so_or_the_file_has_none(files, tmp_path):
    detector, whole = config_of("detection", pretrained=files["detection"]), content(files["detection"])
    bare = {name.removeprefix("backbone."): value for name, value in whole.items() if name.startswith("backbone.")}
    save_file(bare, tmp_path / "network.safetensors")
    wrapped = {f"model.{name}": value for name, value in whole.items()}
    save_file(wrapped, tmp_path / "wrapped.safetensors")
    start = partial(config_of, "detection", NAMES)
    for config in (
        start(pretrained=files["detection"], reset=["heads"]),
        start(pretrained=tmp_path / "network.safetensors"),
    ):
        found = start_weights(model_of(config), config)
        assert found.tensors.keys() == {f"backbone.{name}" for name in bare}
        assert "neck and heads start afresh" in found.notes[0]
    config = start(pretrained=tmp_path / "wrapped.safetensors")
    assert start_weights(model_of(config), config).tensors.keys() == whole.keys()
    # Another detector has other heads: nothing of them is taken without a word.
    dino = small_detectors.run_config("dino").model_dump()
    dino["model"] = detector.model.model_dump()
    for reset in ([], ["classes"]):
        other = check_config(dino | {"model": dino["model"] | {"reset": reset}})
        with pytest.raises(ModelError, match=r"does not fit this config's model.*model.reset=\[\"heads\"\]"):
            start_weights(model_of(other.model_copy(update={"data": detector.data})), other)
    other = check_config(dino | {"model": dino["model"] | {"reset": ["heads"]}})
    assert start_weights(model_of(other.model_copy(update={"data": detector.data})), other).tensors.keys() == {
        f"backbone.{name}" for name in bare
    }


@pytest.mark.parametrize("task", TASKS)
def test_a_released_checkpoint_is_taken_as_it_is(files, tmp_path, task):
    whole = content(files[task])
    weights = to_released(whole, config_of(task).model)
    torch.save({"state_dict": weights, "meta": {"CLASSES": NAMES}}, tmp_path / "released.pth")
    config = config_of(task, pretrained=tmp_path / "released.pth")
    found = start_weights(model_of(config), config).tensors
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], value) for name, value in whole.items())
    config = config_of(task, ("red", "white"), pretrained=tmp_path / "released.pth")
    with pytest.raises(ModelError, match=r"3 \(disc, box, star\).*model.reset"):
        start_weights(model_of(config), config)
    config = config_of(task, ("red", "white"), pretrained=tmp_path / "released.pth", reset=["classes"])
    afresh = whole.keys() - start_weights(model_of(config), config).tensors.keys()
    assert {name.rpartition(".")[0] for name in afresh} == CLASS_LAYERS[task]


def test_another_network_and_an_absent_file_are_one_line(files):
    values = config_of("detection", pretrained=files["detection"]).model_dump()
    values["model"]["branches"] = values["model"]["branches"][:1]
    other = check_config(values)
    with pytest.raises(ModelError, match=r"use a config of the same network"):
        start_weights(model_of(other), other)
    absent = config_of("detection", pretrained="/none.safetensors")
    with pytest.raises(ModelError, match="no such file"):
        start_weights(model_of(absent), absent)


def test_the_files_of_branches_are_not_read_and_that_is_said(files):
    values = config_of("detection", pretrained=files["detection"]).model_dump()
    values["model"]["branches"][0]["pretrained"] = "pretrained/intern_vit_6b_224px.pth"
    config = check_config(values)
    found = start_weights(model_of(config), config)
    assert found.tensors.keys() == content(files["detection"]).keys()
    assert "the files that 1 of them name are not read" in found.notes[0]


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"reset": ("classes",)}, "set pretrained to a file"),
        ({"reset": ("clases",), "pretrained": "a"}, "'classes' or 'heads'"),
        ({"reset": "classes", "pretrained": "a"}, "model.reset"),
    ],
)
def test_what_can_be_reset_is_checked(model, words):
    values = config_of("detection").model_dump()
    with pytest.raises(ConfigError) as raised:
        check_config(values | {"model": values["model"] | model})
    assert words in raised.value.line


def started(world, _device, *configs):
    """The weights and statistics of each config's engine before its first step."""
    found = []
    for config in configs:
        engine, _ = build_engine(model_of(config), config, world)
        buffers = {name: buffer.numpy().copy() for name, buffer in engine.module.named_buffers()}
        sharded = sum(not getattr(p, "ds_persist", True) for p in engine.module.parameters())
        found.append((weights_of(engine) | buffers, sharded))
    return found


def test_two_ranks_of_zero_3_start_from_it_whole_but_for_the_classes(files):
    zero = {"stage": 3, "persistence_threshold": 0, "deepspeed": FORCED_RELEASE}
    configs = [
        config_of(
            task,
            ("red", "white"),
            pretrained=path,
            reset=["classes"],
            zero=zero,
            train={"steps": 1, "precision": "fp32"},
        )
        for task, path in files.items()
    ]
    first, second = run_ranks(2, started, *configs)
    for task, (here, sharded), (there, _) in zip(TASKS, first, second, strict=True):
        expected = content(files[task])
        assert sharded > 10
        for name, value in expected.items():
            np.testing.assert_array_equal(here[name], there[name], err_msg=name)
            if name.rpartition(".")[0] in CLASS_LAYERS[task]:
                assert here[name].shape != value.shape
            else:
                np.testing.assert_array_equal(here[name], value.numpy(), err_msg=name)


def test_what_starts_afresh_is_logged(files, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("piip_scale"), "propagate", True)
    from piip_scale.engine.zero.plan import measure, plan_sharding
    from piip_scale.engine.zero.setup import give_weights

    start = {"pretrained": files["segmentation"], "reset": ["classes"], "zero": {"stage": 1}}
    config = config_of("segmentation", ("red", "white"), **start)
    model = model_of(config)
    sizes = measure(model, model.parts())
    with caplog.at_level("INFO"):
        give_weights(model, config, sizes, plan_sharding(config, sizes, 1), torch.device("cpu"))
    assert "the layers of the classes start afresh: heads.heads.decode_head.conv_seg" in caplog.text
    expected, state = content(files["segmentation"]), model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in expected.items() if "conv_seg" not in name)
