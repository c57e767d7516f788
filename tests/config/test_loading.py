"""Config files: inheritance, overrides, one-line errors, and the way back to a file."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from piip_scale.config.loading import check_config, config_text, load_config
from piip_scale.errors import ConfigError

BASE = """
model = dict(
    branches=[
        dict(resolution_px=64, embed_dim=96, depth=4, num_heads=4, patch_size_px=8),
        dict(resolution_px=128, embed_dim=64, depth=4, num_heads=4, patch_size_px=8),
    ],
    interaction=dict(num_stages=4, num_heads=4),
)
detector = dict(kind="mask_rcnn", overrides=dict(neck=dict(out_channels=64)))
data = dict(train_shards="train", val_shards="val", num_streams=4)
train = dict(steps=10, precision="fp32")
"""


@pytest.fixture
def base(tmp_path):
    path = tmp_path / "base.py"
    path.write_text(BASE)
    return path


def test_file_becomes_typed_config(base):
    config = load_config(base)
    assert [branch.embed_dim for branch in config.model.branches] == [96, 64]
    assert config.model.branches[0].kind == "vit"
    assert config.model.geometry.blocks_per_stage[0] == (1, 1, 1, 1)


def test_base_files_merge_and_delete_replaces(base, tmp_path):
    child = tmp_path / "child.py"
    child.write_text(
        "_base_ = ['base.py']\ntrain = dict(_delete_=True, epochs=2)\noptimizer = dict(lr=3e-4)\n"
        "detector = dict(overrides=dict(neck=dict(num_outs=4)))\n"
    )
    config = load_config(child)
    assert (config.train.epochs, config.train.steps, config.train.precision) == (2, None, "bf16")
    assert config.optimizer.lr == 3e-4
    assert config.detector.overrides == {"neck": {"out_channels": 64, "num_outs": 4}}


def test_named_branches_merge_by_name_and_become_a_list_in_the_bases_order(tmp_path):
    large, small = "embed_dim=96, depth=4, num_heads=4", "embed_dim=64, depth=4, num_heads=4"
    branches = f"dict(large=dict({large}), small=dict({small}))"
    (tmp_path / "base.py").write_text(BASE + f"model['branches'] = {branches}\n")
    (tmp_path / "child.py").write_text(
        "_base_ = ['base.py']\n"
        "model = dict(branches=dict(last=dict(resolution_px=256, depth=8, num_heads=2, embed_dim=32),"
        "small=dict(_delete_=True, preset='deit3_small', depth=8, resolution_px=128), large=dict(resolution_px=64)))\n"
    )
    config = load_config(tmp_path / "child.py", ["model.branches.0.depth=8"])
    found = [(b.resolution_px, b.embed_dim, b.depth) for b in config.model.branches]
    assert found == [(64, 96, 8), (128, 384, 8), (256, 32, 8)]


def test_overrides_reach_lists_and_keep_types(base):
    config = load_config(
        base, ["model.branches.1.embed_dim=32", "data.train_shards=/a b/c", "optimizer.betas=(0.9,0.95)"]
    )
    assert config.model.branches[1].embed_dim == 32
    assert config.data.train_shards == "/a b/c"
    assert config.optimizer.betas == (0.9, 0.95)


def test_a_star_takes_every_entry_of_a_list(base):
    overrides = ["model.branches.*.checkpoint_blocks=True", "model.branches.0.checkpoint_blocks=False"]
    first, *others = load_config(base, overrides).model.branches
    assert first.checkpoint_blocks is False
    assert others
    assert all(branch.checkpoint_blocks is True for branch in others)


def test_resolved_text_loads_to_the_same_config(base, tmp_path):
    config = load_config(base)
    (tmp_path / "resolved.py").write_text(config_text(config))
    assert load_config(tmp_path / "resolved.py") == config


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.stepz=3", ["unknown config key train.stepz", "3", "did you mean steps?", "gradient_accumulation"]),
        ("model.branches.0.depht=3", ["model.branches.0.depht", "did you mean depth?"]),
        ("optimiser=3", ["unknown config key optimiser", "did you mean optimizer?"]),
        ("train.steps=soon", ["train.steps", "'soon'", "valid integer"]),
        ("train.steps=True", ["train.steps", "True", "valid integer"]),
        ("optimizer.lr='0.1'", ["optimizer.lr", "'0.1'", "valid number"]),
        ("optimizer.lr=-1.0", ["optimizer.lr", "-1.0", "greater than 0"]),
        ("zero.stage=4", ["zero.stage", "4", "0, 1, 2 or 3"]),
        ("model.branches.0.num_heads=5", ["model.branches.0", "num_heads=5 must divide embed_dim=96"]),
        ("model.interaction.num_heads=5", ["interaction.num_heads=5 must divide 48", "branches.0"]),
        ("model.interaction.num_stages=3", ["num_stages=3 must divide", "depth=4"]),
        ("model.branches.1.resolution_px=32", ["[64, 32]", "must rise"]),
        ("model.branches.0.preset=vit_huge", ["preset='vit_huge'", "deit_tiny"]),
        ("model.branches.9.depth=2", ["model.branches.9", "'9'", "0 to 1"]),
        ("model.branches.0.preset={'a': 1}", ["preset={'a': 1}", "deit_tiny"]),
        ("data.augment.std=(0.0, 1.0, 1.0)", ["data.augment.std.0", "greater than 0"]),
        ("train.milestone_every_steps=700", ["milestone_every_steps=700 must be a multiple of", "=500"]),
        ("train.epochs=2", ["exactly one of epochs=2 and steps=10"]),
        ("data.augment.jitter_scale=(0.5,2.0)", ["data.augment", "set crop_px as well"]),
        ("data.augment.crop_first={'short_edge_px': (), 'crop_range_px': (3, 4)}", ["augment.crop_first", "empty"]),
        (
            "data.augment.crop_first={'short_edge_px': (9,), 'crop_range_px': (5, 4)}",
            ["data.augment.crop_first", "[5, 4] must be low <= high"],
        ),
        (
            "data.augment={'crop_first': {'short_edge_px': (9,), 'crop_range_px': (4, 5)}, 'jitter_scale': (1.0, 2.0),"
            "'crop_px': (9, 9)}",
            ["data.augment", "set one of them"],
        ),
        ("detector.kind=yolo", ["detector.kind", "'yolo'", "'mask_rcnn'"]),
        ("train.steps={[]: 1}", ["train.steps", "'{[]: 1}'", "integer"]),
        (
            "zero.persistence_threshold=-1",
            ["config key zero.persistence_threshold: got -1", "'auto' or", "or equal to 0"],
        ),
        ("optimizer.betas=(2.0, 0.9)", ["optimizer.betas.0", "2.0", "less than 1"]),
        (f"train.seed={2**63}", ["train.seed", str(2**63)]),
        ("model.interaction.value_ratio=1e-9", ["num_heads", "divide 0", "branches.0"]),
        ("no_equals_sign", ["override", "'no_equals_sign'", "key.path=value"]),
        ("train.steps.more=3", ["override train.steps.more", "10", "must hold a dict"]),
    ],
)
def test_a_bad_override_is_one_line_naming_key_value_and_rule(base, override, expected):
    with pytest.raises(ConfigError) as error:
        load_config(base, [override])
    assert "\n" not in error.value.line
    for part in expected:
        assert part in error.value.line


def test_a_missing_key_says_what_is_needed(base):
    base.write_text(BASE.replace("detector = dict", "_unused = dict"))
    with pytest.raises(
        ConfigError, match="config key detector is missing; DetectionRun needs model, data, train, detector"
    ):
        load_config(base)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("_base_ = ['nowhere.py']", "nowhere.py"),
        ("train = dict(steps=", "SyntaxError"),
        ("train = undefined_name", "undefined_name"),
    ],
)
def test_a_file_that_cannot_load_is_one_line(tmp_path, text, expected):
    path = tmp_path / "broken.py"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert expected in error.value.line
    assert "broken.py" in error.value.line
    assert "\n" not in error.value.line


@pytest.mark.parametrize("name", ["absent.py", "config.yaml"])
def test_a_path_that_is_no_config_is_refused(tmp_path, name):
    (tmp_path / "config.yaml").write_text("a: 1")
    with pytest.raises(ConfigError, match=name):
        load_config(tmp_path / name)


@given(
    heads=st.integers(1, 8),
    width=st.integers(1, 64),
    lr=st.floats(1e-8, 1.0),
    window=st.lists(st.integers(0, 9), min_size=4, max_size=4),
)
def test_any_valid_config_survives_the_way_to_a_file_and_back(tmp_path_factory, heads, width, lr, window):
    branch = dict(resolution_px=64, embed_dim=32 * heads * width, depth=4, num_heads=heads, window_size_tokens=window)
    config = check_config(
        dict(
            model=dict(branches=[branch], interaction=dict(num_stages=2)),
            detector=dict(kind="dino", overrides={"bbox_head.num_classes": 3}),
            data=dict(train_shards="it's", val_shards='"quoted"'),
            optimizer=dict(lr=lr),
            train=dict(epochs=1),
        )
    )
    path = tmp_path_factory.mktemp("config") / "resolved.py"
    path.write_text(config_text(config))
    assert load_config(path) == config
