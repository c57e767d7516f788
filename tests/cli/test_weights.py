import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from piip_scale.cli.app import app
from piip_scale.errors import ConfigError, ModelError
from piip_scale.models.official import from_official
from piip_scale.models.official_config import read_official_config
from piip_scale.models.official_keys import official_name
from piip_scale.models.piip import PIIP

VIT = {"depth": 2, "num_heads": 4, "qkv_bias": True, "pretrain_img_size": 32, "interaction_indexes": [[0, 0], [1, 1]]}
BACKBONE = {
    "type": "PIIPTwoBranch",
    "deform_num_heads": 4,
    "with_cffn": True,
    "interact_attn_type": "deform",
    "branch1": VIT | {"embed_dim": 64, "real_size": 32, "pretrained": "deit_base.pth"},
    "branch2": VIT | {"embed_dim": 32, "real_size": 64, "pretrained": "deit_small.pth"},
}


@pytest.fixture
def released(tmp_path):
    """A detector's checkpoint as the released code writes it, and its backbone dict."""
    torch.manual_seed(0)
    official = read_official_config(BACKBONE)
    state = from_official(BACKBONE).state_dict()
    weights = {f"backbone.{official_name(name, official)}": torch.randn_like(value) for name, value in state.items()}
    torch.save({"state_dict": weights | {"neck.bias": torch.zeros(3)}, "meta": {}}, tmp_path / "released.pth")
    (tmp_path / "backbone.json").write_text(json.dumps(BACKBONE))
    return tmp_path, weights


def run(folder: Path, *more: str):
    arguments = [folder / "released.pth", "--backbone", folder / "backbone.json", "--out", folder / "out.safetensors"]
    return CliRunner().invoke(app, ["weights", "import", *map(str, arguments), *more])


def test_a_released_checkpoint_becomes_the_start_of_a_network(released):
    folder, weights = released
    result = run(folder)
    assert result.exit_code == 0, result.exception
    assert f"{sum(value.numel() for value in weights.values()):,} parameters" in result.output
    ours, image = PIIP(read_official_config(BACKBONE).config).eval(), torch.randn(1, 3, 64, 64)
    ours.load_state_dict(load_file(folder / "out.safetensors"))
    for feature, expected in zip(ours(image), from_official(BACKBONE, weights)(image), strict=True):
        assert torch.equal(feature, expected)


def test_a_file_that_is_there_is_kept(released):
    folder, _ = released
    run(folder)
    before = (folder / "out.safetensors").read_bytes()
    assert isinstance(run(folder).exception, ModelError)
    assert (folder / "out.safetensors").read_bytes() == before
    assert run(folder, "--overwrite").exit_code == 0


def test_what_does_not_fit_leaves_no_file(released):
    folder, weights = released
    weights.popitem()
    torch.save(weights, folder / "released.pth")
    assert "missing" in run(folder).exception.line
    assert sorted(path.name for path in folder.iterdir()) == ["backbone.json", "released.pth"]


@pytest.mark.parametrize("text", ["[1]", "{", ""])
def test_a_backbone_that_is_no_object_is_refused(released, text):
    folder, _ = released
    (folder / "backbone.json").write_text(text)
    error = run(folder).exception
    assert isinstance(error, ConfigError)
    assert "\n" not in error.line
