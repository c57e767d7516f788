"""With what a run was started, for the record."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from piip_scale.world import usable_cores

_LIBRARIES = ("piip-scale", "torch", "torchvision", "deepspeed", "mmdet", "mmcv-lite", "mmengine", "webdataset")


def describe_environment() -> dict[str, Any]:
    """Versions, machine and command line of this process, for ``environment.json``."""
    return {
        "command": command_line(),
        "directory": os.getcwd(),
        "host": socket.gethostname(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": usable_cores(),
        "cores_of_node": os.cpu_count(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "libraries": {name: version for name in _LIBRARIES if (version := _version(name))},
        "git_commit": _git_commit(Path(__file__).parent),
    }


def command_line() -> list[str]:
    """This process' command as its user would give it: ranks are started by a file's path, and not by our name."""
    called = Path(sys.argv[0])
    is_ours = called.name == "piip-scale" or called.parts[-3:] == ("piip_scale", "cli", "main.py")
    return ["piip-scale" if is_ours else sys.argv[0], *sys.argv[1:]]


def command_text() -> str:
    """The same for a shell, an option a line: viewers of text do not break lines."""
    return " ".join(f"\\\n  {shlex.quote(w)}" if w.startswith("--") else shlex.quote(w) for w in command_line())


def few_cores_line(usable: int, of_node: int) -> str:
    """What a user should know where a rank is bound to one core of a larger node; empty where it is not.

    Args:
        usable: Cores that the rank may use.
        of_node: Cores of its node.
    """
    if usable > 1 or of_node <= 1:
        return ""
    return (
        f"a rank may use 1 of its node's {of_node} cores, which also have to load the images: ask for more "
        "(--cpus-per-task, of submit or srun), or start srun with --cpu-bind=none"
    )


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit(folder: Path) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40"],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
