import json

import pytest
import torch
from typer.testing import CliRunner

from piip_scale.cli.app import app
from piip_scale.config.loading import load_config
from piip_scale.errors import ConfigError
from piip_scale.tasks.detection.model import build_detection_model

CONFIG = """
model = dict(
    branches=[
        dict(resolution_px=32, embed_dim=64, depth=2, num_heads=4, pretrain_resolution_px=32),
        dict(resolution_px=64, embed_dim=32, depth=2, num_heads=4, pretrain_resolution_px=64),
    ],
    interaction=dict(num_stages=2, num_heads=4),
)
detector = dict(kind="mask_rcnn")
data = dict(train_shards="train", val_shards="val")
train = dict(steps=6)
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "tiny.py"
    path.write_text(CONFIG)
    return path


def run(*arguments):
    return CliRunner().invoke(app, ["count", *map(str, arguments)], catch_exceptions=True)


def test_json_holds_the_exact_numbers(config):
    counted = json.loads(run(config, "--json", "--size", "64x128").output)
    assert (counted["height_px"], counted["width_px"]) == (64, 128)
    with torch.device("meta"):
        model = build_detection_model(load_config(config), counted["num_classes"])
        parameters = sum(p.numel() for p in model.parameters())
    assert sum(part["parameters"] for part in counted["parts"]) == parameters
    square = json.loads(run(config, "--json").output)
    large = {part["name"]: part["macs"] for part in counted["parts"]}
    small = {part["name"]: part["macs"] for part in square["parts"]}
    # Twice the cells: convolutions cost twice, attention more.
    assert large["pyramid"] == 2 * small["pyramid"]
    assert large["branch 1"] > 2 * small["branch 1"]
    # Boxes are as many on an image of any size.
    assert large["box head"] == small["box head"]


def test_the_table_names_every_part_and_their_sum(config):
    lines = run(config, "--set", "model.interaction.num_stages=1").output.splitlines()
    assert lines[0].startswith("64x64 px, one image, 80 classes (COCO's: neither")
    names = [line[:16].strip() for line in lines[2:]]
    heads = ["neck", "rpn", "box head", "mask head"]
    assert names == ["branch 0", "branch 1", "interaction 0", "merging", "pyramid", *heads, "total"]
    columns = [[float(number.replace(",", "")) for number in line[16:].split()[:2]] for line in lines[2:]]
    assert sum(row[0] for row in columns[:-1]) == pytest.approx(columns[-1][0], abs=0.005)
    assert sum(row[1] for row in columns[:-1]) == pytest.approx(columns[-1][1], abs=0.005)
    assert lines[names.index("mask head") + 2].endswith("at most 100 detections")


@pytest.mark.parametrize("size", ["640", "0x64", "64x64x64", "axb"])
def test_a_size_that_is_none_is_refused(config, size):
    result = run(config, "--size", size)
    assert isinstance(result.exception, ConfigError)
    assert "height and width in px" in result.exception.line
