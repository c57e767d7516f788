"""A process opens each set once: ranks, the command that starts them, and commands that only look at a run."""

from __future__ import annotations

from collections import Counter

import pytest
from commands import OPERATIONS
from opened_sets import assert_found_once, assert_opened_once, opening
from sections.file_operations import logged_operations, noted_operations
from sections.rank_costs import opening_sets
from typer.testing import CliRunner

from piip_scale.cli.app import app

ALONE = ("--set", "data.workers=0")
SWEEP = ("--sweep", "train.seed=0,1", "--nodes", "1", "--gpus-per-node", "2")
COMMANDS = {
    "evaluate at two scales": (("evaluate", "{run}", "--scales", "1,1.5", *ALONE), ("val",)),
    "evaluate by a config without names": (("evaluate", "{config}", "{weights}", *ALONE), ("val",)),
    "submit evaluate": (("submit", "evaluate", "{run}", "--out", "{out}", "--dry-run"), ("val",)),
    "submit a sweep": (("submit", "{config}", *SWEEP, "--run-dir", "{out}", "--dry-run"), ("train", "val")),
    "predict by a config without names": (("predict", "{config}", "{weights}", "{photo}", "--out", "{out}"), ("val",)),
    "replay of two ranks": (("replay", "{run}", "5"), ("train", "val")),
}


def test_ranks_open_their_sets_once_and_their_loaders_none(trained, shards):
    """Two ranks that train and evaluate, and the command that started them."""
    by_process, sets = logged_operations(trained.parent / OPERATIONS), [shards / "train", shards / "val"]
    assert_opened_once(by_process.values(), sets, num_processes=3)
    assert len(by_process) > 3
    assert opening(sets).total() * 3 == opening_sets(3, num_sets=2, num_shards=2)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_opens_a_set_once(config, trained, weights, scenes, shards, tmp_path, command):
    words, sets = COMMANDS[command]
    photo = next(scenes.images.iterdir())
    places = {"run": trained, "config": config, "weights": weights, "out": tmp_path / "out", "photo": photo}
    operations = Counter()
    with noted_operations(shards, lambda *operation: operations.update([operation])):
        done = CliRunner().invoke(app, [word.format_map(places) for word in words], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    assert_found_once(operations, [shards / name for name in sets])
