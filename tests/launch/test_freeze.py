"""What is put aside when a job is submitted stays as it was, and tells all there is to know of the checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from piip_scale.launch import freeze
from piip_scale.launch.freeze import Frozen, freeze_code, freeze_config, git_state
from piip_scale.launch.spec import ENTRY_FILE, entry_command


def git(folder, *words):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main"]
    return subprocess.run(
        ["git", "-C", str(folder), *identity, *words], check=True, capture_output=True, text=True
    ).stdout


def write_package(checkout, word):
    package = checkout / "piip_scale"
    (package / "cli").mkdir(parents=True, exist_ok=True)
    for folder in (package, package / "cli"):
        (folder / "__init__.py").write_text("")
    (package / "cli" / "main.py").write_text(
        f"def main():\n    print({word!r})\n\n\nif __name__ == '__main__':\n    main()\n"
    )
    return package


@pytest.fixture
def checkout(tmp_path):
    folder = tmp_path / "check out's"
    write_package(folder, "before")
    git(folder.parent, "init", "-q", str(folder))
    (folder / ".gitignore").write_text("__pycache__/\nignored\n")
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "first")
    return folder


def run_frozen(frozen, checkout):
    """As the batch script does, from the checkout, with the checkout on the path too."""
    path = f"{frozen.code}{os.pathsep}{checkout}"
    environment = {"PYTHONPATH": path, "PYTHONSAFEPATH": "1", "PATH": os.environ["PATH"]}
    words = [sys.executable, *entry_command(frozen.code)]
    done = subprocess.run(words, cwd=checkout, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


# A colon ends an entry of PYTHONPATH, which then does not find the copy.
@pytest.mark.parametrize("name", ["run", "it's 12:30"])
def test_an_edit_of_the_checkout_does_not_reach_a_frozen_job(checkout, tmp_path, name):
    frozen = freeze_code(tmp_path / name / "frozen", checkout / "piip_scale")
    write_package(checkout, "after")
    assert run_frozen(frozen, checkout) == "before"
    # The trap that the entry file is for: -m looks into the current folder before PYTHONPATH.
    words = [sys.executable, "-m", "piip_scale.cli.main"]
    environment = {"PYTHONPATH": str(frozen.code), "PATH": os.environ["PATH"]}
    done = subprocess.run(words, cwd=checkout, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "after"


def test_freezing_again_replaces_everything(checkout, tmp_path):
    folder = tmp_path / "frozen"
    freeze_code(folder, checkout / "piip_scale")
    freeze_config(folder, "old = 1\n")
    (folder / "code" / "piip_scale" / "gone.py").write_text("")
    write_package(checkout, "second")
    frozen = freeze_code(folder, checkout / "piip_scale")
    assert run_frozen(frozen, checkout) == "second"
    assert not frozen.config.exists()
    assert not (folder / "code" / "piip_scale" / "gone.py").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["check out's", "frozen"]


def test_the_real_package_is_whole(tmp_path):
    frozen = freeze_code(tmp_path / "frozen")
    assert not list(frozen.code.rglob("__pycache__"))
    words = [sys.executable, str(frozen.code / ENTRY_FILE), "--version"]
    environment = {"PATH": os.environ["PATH"]}
    done = subprocess.run(words, cwd="/", env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip()
    assert any(line.startswith("torch==") for line in frozen.packages.read_text().splitlines())


def test_the_patch_brings_a_clone_to_the_same_state(checkout, tmp_path):
    package = checkout / "piip_scale"
    write_package(checkout, "changed")
    (checkout / "new file's.txt").write_text("new\n")
    (checkout / "*").write_text("a name that git would take for a pattern\n")
    (checkout / "data.bin").write_bytes(bytes(range(256)))
    (checkout / "ignored").write_text("x")
    (checkout / "staged.txt").write_text("staged\n")
    git(checkout, "add", "staged.txt")
    (checkout / "large.bin").write_bytes(b"0" * (freeze.MAX_UNTRACKED_BYTES + 1))
    before = git(checkout, "status", "--porcelain"), sorted(map(str, (checkout / ".git").rglob("objects/*/*")))
    frozen = freeze_code(tmp_path / "frozen", package)
    assert (
        git(checkout, "status", "--porcelain"),
        sorted(map(str, (checkout / ".git").rglob("objects/*/*"))),
    ) == before
    state = json.loads(frozen.git.read_text())
    assert (state["dirty"], state["branch"], state["left_out"]) == (True, "main", ["large.bin"])
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "-q", str(checkout), str(clone))
    git(clone, "checkout", "-q", state["commit"])
    git(clone, "apply", str(frozen.patch))
    names = [path.relative_to(checkout) for path in checkout.rglob("*") if path.is_file() and ".git" not in path.parts]
    for name in names:
        if name.name not in ("ignored", "large.bin"):
            assert (clone / name).read_bytes() == (checkout / name).read_bytes(), name
    assert not (clone / "ignored").exists()


def test_a_clean_checkout_has_an_empty_patch(checkout):
    state, patch = git_state(checkout / "piip_scale")
    assert (state.dirty, patch, len(state.commit)) == (False, b"", 40)


def test_a_package_outside_of_git_or_in_somebody_elses_has_no_state(tmp_path, checkout):
    package = write_package(tmp_path / "site-packages", "x")
    assert git_state(package) == (freeze.GitState(), b"")
    # As a .venv inside a checkout.
    inside = write_package(checkout / "ignored", "x")
    assert git_state(inside) == (freeze.GitState(), b"")


def test_git_that_is_not_there_costs_the_record_and_not_the_job(checkout, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    frozen = freeze_code(tmp_path / "frozen", checkout / "piip_scale")
    assert json.loads(frozen.git.read_text())["commit"] is None
    assert isinstance(frozen, Frozen)
