"""README and docs are true: every command line runs or parses, every link, path, config key and target exists."""

from __future__ import annotations

import os
import re
from configparser import ConfigParser
from pathlib import Path

import cv2
import docs_pages
import pytest
import torch
from docs_desk import CUT, Elsewhere, lay_out, leave_a_run
from docs_pages import PAGES, ROOT
from pydantic import BaseModel
from typer.main import get_command
from typer.testing import CliRunner

from piip_scale.cli.app import app
from piip_scale.config import load_config
from piip_scale.config.explain import _models_in
from piip_scale.engine.batching import scale_to_ranks
from piip_scale.errors import PiipError
from piip_scale.registry import TASKS

COMMANDS = docs_pages.commands()
OURS = [command for command in COMMANDS if command.arguments[0] == "piip-scale"]
OTHERS = {"curl", "make", "pip", "source", "tensorboard", "eval", "launch/minislurm", "sbatch", "torchrun"}
SETS = {
    "detection": ("more_shards/train", "more_shards/val"),
    "segmentation": ("sets/maps", "sets/maps"),
    "classification": ("sets/classes", "sets/classes"),
}
TRAINED = "configs/demo/masks.py"
# What is started on each; a submission that is dry asks nobody.
STARTED = {
    "train": {"launch_local", "_train_here"},
    "supervise": {"run"},
    "preflight": {"check_nodes"},
    "jobs": {"queued_jobs"},
}
# All that is not run above, but for what README shows of an error.
OTHERS_OF_OURS = [
    c
    for c in OURS
    if c.arguments[1] not in ("shards", "evaluate", "predict", "serve") and "num_heads=5" not in c.arguments[-1]
]

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder where everything lies that the pages' commands name."""
    desk = tmp_path_factory.mktemp("desk")
    lay_out(desk, ROOT)
    return desk


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


def test_the_readmes_five_commands_run_one_after_the_other(desk, run, trained, monkeypatch):
    shown = [command.arguments[1:] for command in OURS if command.page == "README.md"]
    monkeypatch.chdir(desk)
    for arguments in shown[: next(i for i, arguments in enumerate(shown) if arguments[0] == "predict") + 1]:
        # Its training is the fixture's, and the start of it is tested below.
        if arguments[0] == "train":
            options = parsed(arguments).params
            assert (str(options["config"]), str(options["run_dir"])) == (TRAINED, "runs/mine")
            continue
        result = run(arguments)
        assert result.exit_code == 0, (arguments, result.output)
    assert (desk / "mine.safetensors").stat().st_size > 1e6
    assert cv2.imread(str(desk / "photo.png")) is not None


def test_the_error_that_the_readme_shows_is_the_one_that_comes(run):
    (arguments,) = [command.arguments[1:] for command in OURS if "num_heads=5" in command.arguments[-1]]
    with pytest.raises(PiipError) as caught:
        run(arguments)
    assert f"piip-scale: error: {caught.value.line}\n" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize(
    "arguments", [c.arguments[1:] for c in OURS if c.page != "README.md" and c.arguments[1] == "shards"], ids=" ".join
)
def test_what_the_docs_show_of_shards_runs(desk, run, arguments):
    result = run([word.replace("shards/", "more_shards/") for word in arguments])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("command", [*OURS, *docs_pages.examples()], ids=str)
def test_every_command_line_is_one_of_ours_and_its_config_loads(command, desk, monkeypatch):
    monkeypatch.chdir(desk)
    options = parsed(command.arguments[1:]).params
    refused = command.page == "README.md" and "num_heads=5" in command.arguments[-1]
    if options.get("config") and str(options["config"]).startswith("configs/") and not refused:
        config = load_config(options["config"], options.get("overrides") or [])
        # A step's images must be shared by the ranks, which nothing else says of an example.
        scale_to_ranks(
            config, (options.get("nodes") or 1) * (options.get("gpus_per_node") or options.get("procs") or 1)
        )


@pytest.fixture(scope="module")
def trained(desk, run):
    """Sets of every task, and a run that has a checkpoint with averages."""
    maps = ("shards", "pack", "label-maps", "maps/train", "--images", "images/", "--class-names", "names.txt")
    for words in (
        (*maps, "--out", "sets/maps"),
        ("shards", "pack", "image-folders", "imagenet/train", "--out", "sets/classes"),
    ):
        result = run(words)
        assert result.exit_code == 0, result.output
    torch.manual_seed(0)
    before = Path.cwd()
    os.chdir(desk)
    try:
        leave_a_run(Path(TRAINED), sets_of("detection"), Path("runs/mine"))
    finally:
        os.chdir(before)


def sets_of(task: str) -> list[str]:
    return [f"data.{split}_shards={folder}" for split, folder in zip(("train", "val"), SETS[task], strict=True)]


def with_sets(arguments: tuple[str, ...], desk: Path, monkeypatch) -> list[str]:
    """The command with sets that lie here, of the task that its config has, and of two blocks what is huge."""
    monkeypatch.chdir(desk)
    options = parsed(arguments).params
    config = options.get("config")
    if arguments[0] in ("jobs", "convert", "weights", "export") or config is None:
        return list(arguments)
    values = [*sets_of(load_config(config, options["overrides"] or []).task), *CUT.get(Path(config).name, ())]
    return [*arguments, *(word for value in values for word in ("--set", value))]


@pytest.mark.parametrize("command", OTHERS_OF_OURS, ids=str)
def test_the_docs_commands_run_dry_or_up_to_where_ranks_would_start(command, desk, run, trained, monkeypatch):
    elsewhere, arguments = Elsewhere(), with_sets(command.arguments[1:], desk, monkeypatch)
    # Following a log ends with its job.
    elsewhere.install(monkeypatch, desk / "runs" / "NAME", done="-f" in arguments)
    if arguments[0] in ("train", "supervise") and "--resume" not in arguments:
        arguments += ["--run-dir", f"runs/{len(list((desk / 'runs').iterdir()))}"]
    result = run(arguments + {"submit": ["--dry-run"], "convert": ["--overwrite"]}.get(arguments[0], []))
    assert result.exit_code == 0, result.output
    assert arguments[0] not in STARTED or STARTED[arguments[0]] & set(elsewhere.asked)
    if arguments[0] == "submit":
        assert result.stdout.startswith("#!/bin/bash\n")
        assert set(elsewhere.asked) <= {"check_pretrained"}


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
