"""Where ranks keep what they compile, on each node: a folder of this user's own, since what lies there is run."""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from pathlib import Path

from piip_scale.errors import RunError
from piip_scale.files import private_folder

LOCAL_CACHE = "PIIP_SCALE_LOCAL_CACHE"
"""The variable that names the folder of a node in which the private one is made: ``local_cache`` of a profile."""
_FOLDERS = {
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TORCH_EXTENSIONS_DIR": "torch_extensions",
}


def use_local_cache(environment: MutableMapping[str, str] = os.environ) -> Path | None:
    """Points the compilers' caches into a private folder on this node; one that a variable names already stays there.

    Returns:
        The folder; ``None`` where the job has none.

    Raises:
        RunError: It cannot be made, or somebody else made it.
    """
    if not environment.get(LOCAL_CACHE):
        return None
    path = Path(environment[LOCAL_CACHE]) / f"piip_scale_compiled_{os.getuid()}"
    private_folder(path, RunError, fix="choose another local_cache in the profile, or remove the folder")
    for name, folder in _FOLDERS.items():
        environment.setdefault(name, str(private_folder(path / folder, RunError, fix="remove the folder")))
    return path
