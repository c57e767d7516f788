"""How a command ends that is interrupted, at any moment."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from piip_scale.cli.main import main
from piip_scale.config import loading

DIGITS = Path(__file__).parents[2] / "configs" / "demo" / "digits.py"
PRESSED_WHILE_IMPORTING = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.{handler})
class Pressed:
    def find_spec(self, name, *_):
        if name == "{module}":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Pressed())
# The set is not there, which is seen after the imports.
sys.argv = ["piip-scale", "train", "configs/demo/digits.py", "--run-dir", "{run}", "--set", "data.train_shards=no"]
from piip_scale.cli.main import main
main()
"""


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_ctrl_c_in_any_command_is_one_line_and_exit_code_130(monkeypatch, capsys):
    monkeypatch.setattr(loading, "load_config", interrupted)
    monkeypatch.setattr(sys, "argv", ["piip-scale", "plan", str(DIGITS)])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 130
    assert capsys.readouterr().err == "piip-scale: stopped by Ctrl-C before it was done\n"


@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("1", 0), ("x", 1)])
def test_ctrl_c_is_told_of_by_one_of_many_ranks(monkeypatch, tmp_path, capsys, rank, lines):
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in {"RANK": rank, "LOCAL_RANK": rank, **shared}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("piip_scale.cli.train.load_config", interrupted)
    monkeypatch.setattr(sys, "argv", ["piip-scale", "train", str(DIGITS), "--run-dir", str(tmp_path)])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 130
    assert capsys.readouterr().err == "piip-scale: stopped by Ctrl-C before it was done\n" * lines


@pytest.mark.parametrize("module", ["piip_scale.cli.app", "torch", "piip_scale.data.reading.opened"])
@pytest.mark.parametrize(("handler", "code"), [("default_int_handler", 130), ("SIG_IGN", 2)])
def test_ctrl_c_among_a_trainings_imports_is_one_line_unless_it_is_ignored(tmp_path, module, handler, code):
    program = PRESSED_WHILE_IMPORTING.format(handler=handler, module=module, run=tmp_path / "run")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=240)
    line = "piip-scale: stopped by Ctrl-C before it was done\n"
    assert (done.returncode, done.stderr.count("\n"), line == done.stderr) == (code, 1, code == 130)
