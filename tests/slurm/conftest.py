from __future__ import annotations

import os
import shutil
import socket
import subprocess
from pathlib import Path

import commands
import pytest
from jobs import Cluster, Job

from piip_scale.data.packing.pack import pack_coco
from piip_scale.demo.scenes import write_scenes

ROOT = Path(__file__).parents[2]
NODES = 3


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slurm)


def free_ports(count):
    """A port with so many free ones after it."""
    for first in range(17600, 19000, 20):
        try:
            for port in range(first, first + count):
                with socket.socket() as listener:
                    listener.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first
    pytest.skip("no free ports for Slurm's daemons between 17600 and 19000")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """Real daemons of three nodes on this machine."""
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    missing = [name for name in ("slurmctld", "slurmd", "sbatch") if not shutil.which(name, path=path)]
    if missing:
        pytest.skip(f"needs Slurm: {', '.join(missing)} not found (apt-get install slurmctld slurmd slurm-client)")
    folder = tmp_path_factory.mktemp("slurm")
    words = ["--nodes", NODES, "--cpus", 4, "--port", free_ports(NODES + 1), "--dir", folder]
    tool = [str(ROOT / "launch" / "minislurm")]
    done = subprocess.run([*tool, "up", *map(str, words)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    yield Cluster(folder)
    subprocess.run([*tool, "down", "--dir", str(folder)], capture_output=True, timeout=120, check=True)


@pytest.fixture(scope="session")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    scenes = write_scenes(folder / "scenes", num_train=16, num_val=6, size_px=64, seed=0)
    for split, source in (("train", scenes.train), ("val", scenes.val)):
        pack_coco(source, scenes.images, folder / "shards" / split, workers=1)
    path = folder / "tiny.py"
    path.write_text(commands.CONFIG.replace("{shards}", str(folder / "shards")))
    return path


@pytest.fixture
def job(cluster, config, tmp_path):
    """A job of two nodes that waits after six of twelve steps until a test lets it go on."""
    job = Job(cluster, config, tmp_path)
    yield job
    job.close()
    cluster.heal()


@pytest.fixture
def small_disk(tmp_path):
    """A disk of its own, of 64 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", "size=64m,mode=0700", "tmpfs", str(folder)]
    done = subprocess.run(["mount", *options], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"mounting a small disk needs root: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(scope="session")
def whole(config, tmp_path_factory):
    """What each step tells of a run that nothing disturbs, on as many ranks without Slurm."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    words = ["train", config, "--procs", 2, "--run-dir", run_dir, *Job.settings()]
    commands.succeeded(commands.piip_scale(*words))
    return Job.told(run_dir)
