from __future__ import annotations

import subprocess
from functools import partial

import commands
import pytest
from sections.file_operations import log_operations

from piip_scale.data.packing.pack import pack_coco
from piip_scale.demo.scenes import write_scenes


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    return write_scenes(folder, num_train=16, num_val=6, size_px=64, seed=0)


@pytest.fixture(scope="session")
def shards(scenes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    for split, source in (("train", scenes.train), ("val", scenes.val)):
        pack_coco(source, scenes.images, folder / split, workers=1)
    return folder


@pytest.fixture(scope="session")
def config(shards, tmp_path_factory):
    path = tmp_path_factory.mktemp("configs") / "tiny.py"
    path.write_text(commands.CONFIG.replace("{shards}", str(shards)))
    return path


@pytest.fixture(scope="session")
def trained(config, shards, tmp_path_factory):
    """A run directory that two processes trained to its end."""
    run_dir = tmp_path_factory.mktemp("runs") / "tiny"
    words = ("train", config, "--procs", 2, "--run-dir", run_dir, "--profile", "3-5")
    noted = partial(log_operations, shards, run_dir.parent / commands.OPERATIONS)
    commands.succeeded(commands.piip_scale(*words, preexec_fn=noted))
    return run_dir


@pytest.fixture(scope="session")
def weights(trained, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    commands.succeeded(commands.piip_scale("convert", trained, path))
    return path


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a disk of a given size in bytes; a full disk is then a real one."""
    mounted = []

    def mount(size):
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        options = f"size={size},mode=1777"
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.skip(f"mounting a small disk needs root: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)
