"""DeepSpeed's extensions in C++, which are compiled at their first use on a machine."""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from piip_scale.errors import KernelError
from piip_scale.files import named_folder
from piip_scale.logging import get_logger

_TOOLS = ("c++", "ninja")


def missing_tools() -> list[str]:
    """What a compilation needs and this machine lacks. Finds what is installed beside this Python, too."""
    own = str(Path(sys.executable).parent)
    if own not in os.environ.get("PATH", "").split(os.pathsep):
        # DeepSpeed asks for the ninja package, and nobody need have activated the environment it is in.
        os.environ["PATH"] = os.pathsep.join(filter(None, (os.environ.get("PATH"), own)))
    return [tool for tool in _TOOLS if shutil.which(tool) is None]


def load_extension(builder: Any, field: str) -> Any:
    """Compiles an extension where no earlier run has, and loads it. Not collective: ranks of a machine take turns.

    Args:
        builder: DeepSpeed's, of the extension.
        field: The config's that asks for it, with its value.

    Raises:
        KernelError: It cannot be compiled, or others could have put something else in its place.
    """
    if missing := missing_tools():
        raise _unavailable(builder, field, f"no {' and no '.join(missing)}")
    from torch.utils.cpp_extension import _get_build_directory

    folders = [Path(_get_build_directory(name, verbose=False)) for name in ("pin_memory", builder.name)]
    for folder in folders:
        # What lies there is loaded into this process.
        named_folder(folder, KernelError, fix="set TORCH_EXTENSIONS_DIR to a folder of your own")
    with (folders[-1] / "piip_scale.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not any(folders[-1].glob("*.so")):
            get_logger(__name__).info("compiling DeepSpeed's %s, once on this machine: some minutes", builder.name)
        for folder in folders:
            # torch waits for ever for a lock that a killed compilation left; a living one's we would have waited for.
            (folder / "lock").unlink(missing_ok=True)
        try:
            return builder.load(verbose=False)
        except (RuntimeError, OSError, ImportError, TypeError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise _unavailable(builder, field, reason) from error


def _unavailable(builder: Any, field: str, reason: str) -> KernelError:
    return KernelError(
        f"{field} needs DeepSpeed's {builder.name}, which cannot be built here",
        value=reason,
        rule="it is compiled at its first use, by a C++ compiler and ninja",
        fix=f"install them, or change {field.partition('=')[0]}",
    )
