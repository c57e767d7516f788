"""With what a run was started, for the record."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

_LIBRARIES = ("piip-scale", "torch", "torchvision", "deepspeed", "mmdet", "mmcv-lite", "mmengine", "webdataset")


def describe_environment() -> dict[str, Any]:
    """Versions, machine and command line of this process, for ``environment.json``."""
    return {
        "command": sys.argv,
        "directory": os.getcwd(),
        "host": socket.gethostname(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "libraries": {name: version for name in _LIBRARIES if (version := _version(name))},
        "git_commit": _git_commit(Path(__file__).parent),
    }


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
