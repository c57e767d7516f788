"""A task is one folder and one row: what the rows name is there, and a fourth one needs nothing else."""

import inspect
import json
import subprocess
import sys

import pytest
from toy_task import ROW, ToyRun
from typer.testing import CliRunner

from piip_scale.cli.app import app
from piip_scale.config.loading import check_config, load_config
from piip_scale.config.run import RunConfig
from piip_scale.data.set_kinds import SET_KINDS
from piip_scale.errors import ConfigError
from piip_scale.registry import TASKS, PublicSet, TaskRow
from piip_scale.tasks.counting import count_run, head_flops, network_flops
from piip_scale.tasks.kinds import build_model, build_predictor, build_task
from piip_scale.world import World

CONFIG = """
task = "toy"
model = dict(
    branches=[
        dict(resolution_px=32, embed_dim=64, depth=2, num_heads=4, pretrain_resolution_px=32, frozen_blocks="all"),
        dict(resolution_px=64, embed_dim=32, depth=2, num_heads=4, pretrain_resolution_px=64),
    ],
    interaction=dict(num_stages=2, num_heads=4),
)
data = dict(train_shards="train", val_shards="val")
train = dict(steps=6)
"""
FACTS = {"set_kind", "public_set", "hub_pipeline", "finds_objects", "released_key"}
PARTS = [name for name in inspect.signature(TaskRow).parameters if name not in FACTS]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("task", TASKS)
def test_every_part_that_a_row_names_is_there(task, part):
    assert callable(TASKS[task].load(part))
    assert TASKS[task].set_kind in SET_KINDS


@pytest.mark.parametrize("part", ["check", "summary", "picture"])
@pytest.mark.parametrize("kind", SET_KINDS)
def test_every_part_of_a_kind_of_set_is_there(kind, part):
    assert callable(SET_KINDS[kind].load(part))


@pytest.mark.parametrize("task", TASKS)
def test_a_rows_config_is_of_its_task(task):
    config = TASKS[task].load("config")
    assert issubclass(config, RunConfig)
    assert config.model_fields["task"].annotation.__args__ == (task,)


def test_a_classifiers_parts_and_a_detectors_task_need_none_of_the_detectors_libraries():
    code = (
        "import sys; from piip_scale.registry import TASKS;"
        f"[TASKS['classification'].load(part) for part in {PARTS}];"
        "print([name for name in ('mmdet', 'mmseg', 'mmcv') if name in sys.modules]);"
        "import piip_scale.tasks.detection.task; print('mmdet' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=True)
    assert done.stdout.split() == ["[]", "False"]


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """The path of a run of a fourth task, which is one row."""
    monkeypatch.setitem(TASKS, "toy", TaskRow(**ROW, public_set=PublicSet("Toys", 7)))
    path = tmp_path / "toy.py"
    path.write_text(CONFIG)
    return path


def test_a_fourth_task_is_one_row(toy):
    run = load_config(toy)
    assert type(run) is ToyRun
    counted = count_run(run, 64, 96)
    assert (counted.num_classes, counted.assumed_set, counted.parts[-1].name) == (7, "Toys", "toy head")
    model = build_model(run, 7)
    assert sum(part.parameters for part in counted.parts) == sum(p.numel() for p in model.parameters())
    assert head_flops(run, 7, 64, 96) == 6 * model.heads.weight.numel()
    assert build_task(run, World()).config is run
    classes = run.model_copy(update={"data": run.data.model_copy(update={"classes": ("a",)})})
    assert build_predictor(classes, model, 0.3).classes == ("a",)


def test_the_commands_know_a_fourth_task(toy):
    counted = json.loads(CliRunner().invoke(app, ["count", str(toy), "--json"], catch_exceptions=False).output)
    assert counted["parts"][-1]["name"] == "toy head"
    planned = json.loads(CliRunner().invoke(app, ["plan", str(toy), "--json"], catch_exceptions=False).output)
    assert planned["pace"]["flops_per_image"] == network_flops(load_config(toy), 7, 64, 96)
    assert {part["name"] for part in planned["parts"]} >= {"branch 0", "branch 1", "heads"}


def test_a_task_without_a_row_is_refused():
    with pytest.raises(ConfigError, match="must be one of detection, segmentation, classification"):
        check_config({"task": "toy"})
