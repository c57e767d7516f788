"""The scripts and profiles are there however the package is installed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from piip_scale.launch.installed_files import launch_folder
from piip_scale.launch.profiles import profile_names

ROOT = Path(__file__).parents[2]


def test_a_checkout_uses_its_own():
    assert launch_folder() == ROOT / "launch"


def test_an_installation_brings_them(tmp_path):
    source, prefix = tmp_path / "source", tmp_path / "prefix"
    source.mkdir()
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("piip_scale", "launch"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    words = ["install", "--quiet", "--no-deps", "--no-build-isolation", "--ignore-installed", "--no-compile"]
    pip = [sys.executable, "-m", "pip", *words, "--prefix", str(prefix), str(source)]
    subprocess.run(pip, check=True, capture_output=True, timeout=240)
    packages = next(prefix.rglob("site-packages"))
    code = (
        f"import sys; sys.path.insert(0, {str(packages)!r}); sys.prefix = {str(prefix)!r}\n"
        "from piip_scale.launch import installed_files, profiles\n"
        "print(installed_files.launch_folder(), *profiles.profile_names())"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True, timeout=240, cwd="/"
    )
    folder, *names = done.stdout.split()
    assert Path(folder) == prefix / "share" / "piip-scale" / "launch"
    assert names == profile_names()
    for name in ("minislurm",):
        assert Path(folder, name).stat().st_mode & 0o111
