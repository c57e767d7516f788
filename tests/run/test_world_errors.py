"""An error that a rank meets before it knows which one it is."""

from __future__ import annotations

import os

import pytest

from piip_scale.cli import train as command
from piip_scale.errors import WorldError
from piip_scale.launch.decide import INCURABLE
from piip_scale.run.run_dir import RunDirectory
from piip_scale.world import read_world


class Left(Exception):
    pass


def test_it_lands_with_the_others_and_is_final(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(command, "run_training", lambda *_, **__: read_world())

    def leave(code):
        raise Left(code)

    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(Left) as left:
        command.train(tmp_path / "config.py", tmp_path / "run", progress=False)
    assert left.value.args == (WorldError.exit_code,)
    first = RunDirectory(tmp_path / "run").first_error()
    assert (first.rank, first.reason in INCURABLE) == (3, True)
    assert "environment variable LOCAL_WORLD_SIZE is not set" in first.line
    assert capsys.readouterr().err.count("piip-scale: error:") == 1


def test_alone_it_is_the_commands_own(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise WorldError("so it is")

    monkeypatch.setattr(command, "run_training", refuse)
    with pytest.raises(WorldError):
        command.train(tmp_path / "config.py", tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
