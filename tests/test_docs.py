"""README and docs are true: every command line runs or parses, every link, path, config key and target exists."""

from __future__ import annotations

import os
import re
import shutil
from configparser import ConfigParser
from pathlib import Path

import cv2
import docs_pages
import numpy as np
import pytest
import torch
from docs_pages import PAGES, ROOT
from pydantic import BaseModel
from typer.main import get_command
from typer.testing import CliRunner
from zero_files import write_checkpoint

from piip_scale.checkpoint.store import CheckpointStore
from piip_scale.cli.main import app
from piip_scale.config import load_config
from piip_scale.config.explain import _models_in
from piip_scale.config.loading import config_text
from piip_scale.data.packing.pack import pack_coco
from piip_scale.demo.scenes import write_scenes
from piip_scale.registry import TASKS

COMMANDS = docs_pages.commands()
OURS = [command for command in COMMANDS if command.arguments[0] == "piip-scale"]
OTHERS = {"make", "source", "tensorboard", "eval", "launch/minislurm", "sbatch", "torchrun"}
VOC = """<annotation><filename>{name}.jpg</filename><size><width>64</width><height>64</height><depth>3</depth></size>
<object><name>digit</name><difficult>0</difficult>
<bndbox><xmin>5</xmin><ymin>6</ymin><xmax>40</xmax><ymax>50</ymax></bndbox></object></annotation>"""
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder where everything lies that the pages' commands name."""
    desk = tmp_path_factory.mktemp("desk")
    scenes = write_scenes(desk, num_train=4, num_val=2, size_px=64, seed=0)
    for split, source in (("train", scenes.train), ("val", scenes.val)):
        pack_coco(source, scenes.images, desk / "more_shards" / split, workers=1)
    shutil.copy(scenes.train, desk / "train.json")
    shutil.copy(scenes.val, desk / "val.json")
    for name in ("configs", "launch"):
        (desk / name).symlink_to(ROOT / name)
    photos = sorted(path for path in scenes.images.iterdir() if path.name.startswith("train"))
    shutil.copy(photos[0], desk / "photo.jpg")
    _lay_out_voc(desk, photos)
    _lay_out_maps(desk, photos)
    for split in ("train", "val"):
        for label in ("cat", "dog"):
            (desk / "imagenet" / split / label).mkdir(parents=True)
            shutil.copy(photos[0], desk / "imagenet" / split / label)
    (desk / "list.txt").write_text("".join(f"images/{photo.name} {i % 2}\n" for i, photo in enumerate(photos)))
    (desk / "names.txt").write_text("first\nsecond\n")
    return desk


def _lay_out_voc(desk: Path, photos: list[Path]) -> None:
    folder = desk / "VOC2012"
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    for photo in photos:
        shutil.copy(photo, folder / "JPEGImages")
        (folder / "Annotations" / f"{photo.stem}.xml").write_text(VOC.format(name=photo.stem))
    (folder / "ImageSets" / "Main" / "train.txt").write_text("".join(f"{photo.stem}\n" for photo in photos))
    (desk / "voc_names.txt").write_text("digit\n")


def _lay_out_maps(desk: Path, photos: list[Path]) -> None:
    for images, maps, of in (
        ("images", "maps/train", [p for p in (desk / "images").iterdir()]),
        ("ADE/images/training", "ADE/annotations/training", photos),
    ):
        for folder in (images, maps):
            (desk / folder).mkdir(parents=True, exist_ok=True)
        for photo in of:
            if not (desk / images / photo.name).exists():
                shutil.copy(photo, desk / images)
            cv2.imwrite(str(desk / maps / f"{photo.stem}.png"), np.ones((64, 64), np.uint8))


@pytest.fixture(scope="module")
def run(desk):
    """Runs one of our commands on the desk, in this process; trainings leave a run as if they had."""

    def run(arguments):
        before = Path.cwd()
        os.chdir(desk)
        try:
            return CliRunner().invoke(app, list(arguments), catch_exceptions=False)
        finally:
            os.chdir(before)

    return run


def parsed(arguments):
    """The innermost command's context, as typer's own app parses these arguments."""
    context = get_command(app).make_context("piip-scale", list(arguments))
    while hasattr(context.command, "commands") and context._protected_args + context.args:
        name, command, rest = context.command.resolve_command(context, context._protected_args + context.args)
        context = command.make_context(name, rest, parent=context)
    return context


def leave_a_run(desk: Path, config: Path, overrides: list[str], run_dir: Path) -> None:
    """What training would have left after a step: its config, and a sharded checkpoint of untrained weights."""
    from piip_scale.cli.train import with_classes
    from piip_scale.tasks.kinds import build_model

    resolved = with_classes(load_config(config, overrides))
    model = build_model(resolved, len(resolved.data.classes))
    weights = {name: value.detach() for name, value in model.named_parameters()}
    store = CheckpointStore(run_dir / "checkpoints", keep=1)
    write_checkpoint(store.begin(1) / "zero", 3, 2, [weights], {}, dict(model.named_buffers()))
    store.commit(1)
    (run_dir / "config.py").write_text(config_text(resolved))


def test_the_readmes_five_commands_run_one_after_the_other(desk, run, monkeypatch):
    torch.manual_seed(0)
    shown = [command.arguments[1:] for command in OURS if command.page == "README.md"]
    monkeypatch.chdir(desk)
    for arguments in shown[: next(i for i, arguments in enumerate(shown) if arguments[0] == "predict") + 1]:
        if arguments[0] == "train":
            options = parsed(arguments).params
            leave_a_run(desk, options["config"], options["overrides"], options["run_dir"])
            continue
        result = run(arguments)
        assert result.exit_code == 0, (arguments, result.output)
    assert (desk / "mine.safetensors").stat().st_size > 1e6
    assert cv2.imread(str(desk / "photo.png")) is not None


@pytest.mark.parametrize(
    "arguments", [c.arguments[1:] for c in OURS if c.page != "README.md" and c.arguments[1] == "shards"], ids=" ".join
)
def test_what_the_docs_show_of_shards_runs(desk, run, arguments):
    result = run([word.replace("shards/", "more_shards/") for word in arguments])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("command", OURS, ids=str)
def test_every_command_line_is_one_of_ours_and_its_config_loads(command, desk, monkeypatch):
    monkeypatch.chdir(desk)
    options = parsed(command.arguments[1:]).params
    refused = command.page == "README.md" and "num_heads=5" in command.arguments[-1]
    if options.get("config") and str(options["config"]).startswith("configs/") and not refused:
        load_config(options["config"], options.get("overrides") or [])


def test_other_commands_exist_too(desk, monkeypatch):
    monkeypatch.chdir(desk)
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for command in COMMANDS:
        arguments = command.arguments
        assert arguments[0] in OTHERS | {"piip-scale"}, command
        if arguments[0] == "make":
            assert arguments[1] in targets, command
        if arguments[0] == "torchrun":
            parsed(arguments[arguments.index("piip_scale.cli.main") + 1 :])
        if arguments[0] == "sbatch":
            parsed(("train", *arguments[arguments.index("launch/train.sbatch") + 1 :]))


@pages
def test_inline_commands_name_commands_options_targets_and_extras_that_exist(page):
    root = get_command(app)
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    for text in docs_pages.inline(page):
        arguments = text.split()
        if arguments[0] == "make":
            assert arguments[1] in targets, text
        for extra in re.findall(r"piip-scale\[(\w+)\]", text):
            assert extra in setup["options.extras_require"], text
        command = root
        for word in arguments[1:] if arguments[0] == "piip-scale" else arguments:
            if not hasattr(command, "commands") or word not in command.commands:
                break
            command = command.commands[word]
        if command is not root:
            known = {option for parameter in command.params for option in parameter.opts + parameter.secondary_opts}
            assert set(re.findall(r"--[a-z][a-z-]*", text)) <= known | {"--help"}, text


@pages
def test_every_link_and_path_exists(page):
    for link in docs_pages.links(page):
        target, _, anchor = link.partition("#")
        if not target.startswith("http"):
            path = page.parent / target if target else page
            assert path.exists(), link
            assert not anchor or anchor in docs_pages.anchors(path), link
    missing = {path for path in docs_pages.paths(page) if not (ROOT / path).exists()}
    assert missing == set()


@pages
def test_every_config_key_exists(page):
    for key in docs_pages.config_keys(page):
        models = [row.load("config") for row in TASKS.values()]
        for part in key.split("."):
            # A preset is read before the schema, which has the keys that it stands for.
            if part in ("N", "preset"):
                continue
            fields = [model.model_fields[part] for model in models if part in model.model_fields]
            assert fields, key
            models = [m for field in fields for m in _models_in(field.annotation) if issubclass(m, BaseModel)]


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 120
