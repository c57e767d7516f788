"""What a job will run, put aside when it is submitted: config, code, and a record of everything else.

The config is resolved and the package's code copied, so that an edit of the checkout cannot change a job that waits.
Installed packages are not copied: their versions are recorded.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import piip_scale
from piip_scale.errors import RunError
from piip_scale.files import disk_errors, write_text_atomically
from piip_scale.launch.spec import ENTRY_FILE

MAX_UNTRACKED_BYTES = 1 << 20
MAX_UNTRACKED_FILES = 1000
_GIT_TIMEOUT_S = 60
_ENTRY = """# Starts the copy of the package beside it, whatever the current folder or PYTHONPATH hold.
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from piip_scale.cli.main import main

if __name__ == "__main__":
    main()
"""


@dataclass(frozen=True)
class GitState:
    """The checkout that the package was imported from.

    Attributes:
        commit: What it stands at; ``None`` where there is no checkout.
        branch: By name.
        remote: Where it came from.
        dirty: Whether it holds changes that are not committed; ``uncommitted.patch`` has them, new files included.
        left_out: New files too large, or too many, for the patch.
    """

    commit: str | None = None
    branch: str | None = None
    remote: str | None = None
    dirty: bool = False
    left_out: tuple[str, ...] = ()


class Frozen:
    """The files of a frozen job, by name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = folder / "config.py"
        self.code = folder / "code"
        self.git = folder / "git.json"
        self.patch = folder / "uncommitted.patch"
        self.packages = folder / "packages.txt"


def freeze_code(folder: Path, package: Path | None = None) -> Frozen:
    """Copies the package and records git's state and the installed packages; replaces an earlier copy whole.

    Args:
        folder: Takes the files.
        package: The package's folder; the one this process runs where ``None``.

    Raises:
        RunError: The disk refuses.
    """
    package = package or Path(piip_scale.__file__).parent
    made = Frozen(folder.with_name(f".{folder.name}.{os.getpid()}.part"))
    with disk_errors(RunError, f"freeze the code in {folder}"):
        shutil.rmtree(made.folder, ignore_errors=True)
        try:
            made.folder.mkdir(parents=True)
            shutil.copytree(package, made.code / package.name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
            (made.code / ENTRY_FILE).write_text(_ENTRY, encoding="utf-8")
            state, patch = git_state(package)
            made.git.write_text(json.dumps(asdict(state), indent=1) + "\n", encoding="utf-8")
            made.patch.write_bytes(patch)
            made.packages.write_text("".join(f"{line}\n" for line in installed_packages()), encoding="utf-8")
            _replace_folder(made.folder, folder)
        finally:
            shutil.rmtree(made.folder, ignore_errors=True)
    return Frozen(folder)


def freeze_config(folder: Path, text: str) -> Path:
    """Writes a resolved config into a frozen folder.

    Raises:
        RunError: The disk refuses.
    """
    path = Frozen(folder).config
    with disk_errors(RunError, f"write {path}"):
        write_text_atomically(path, text)
    return path


def installed_packages() -> list[str]:
    """``name==version`` of everything that can be imported, and the interpreter, sorted."""
    found = {
        f"{dist.metadata['Name']}=={dist.version}"
        for dist in importlib.metadata.distributions()
        if dist.metadata["Name"]
    }
    return [f"# Python {sys.version.split()[0]}, {sys.executable}", *sorted(found, key=str.lower)]


def git_state(package: Path) -> tuple[GitState, bytes]:
    """The state of the checkout around a package, and a patch of what is not committed, new files included."""
    top = _git(package, "rev-parse", "--show-toplevel")
    commit = _git(package, "rev-parse", "HEAD")
    # A package inside somebody else's repository, as site-packages of a .venv in a checkout, is not its code.
    if not top or not commit or _git(package, "ls-files", "--", "__init__.py") == "":
        return GitState(), b""
    root = Path(top)
    kept, left_out = _untracked(root)
    patch = _patch(root, kept)
    state = GitState(
        commit=commit,
        branch=_git(root, "rev-parse", "--abbrev-ref", "HEAD"),
        remote=_git(root, "config", "--get", "remote.origin.url"),
        dirty=bool(patch or left_out),
        left_out=tuple(left_out),
    )
    return state, patch


def _untracked(root: Path) -> tuple[list[str], list[str]]:
    names = _git_bytes(root, "ls-files", "--others", "--exclude-standard", "-z") or b""
    kept: list[str] = []
    left_out: list[str] = []
    for name in (os.fsdecode(part) for part in names.split(b"\0") if part):
        path = root / name
        small = path.is_file() and path.stat().st_size <= MAX_UNTRACKED_BYTES and len(kept) < MAX_UNTRACKED_FILES
        (kept if small else left_out).append(name)
    return kept, left_out


def _patch(root: Path, untracked: list[str]) -> bytes:
    """Made in an index and an object store aside: the user's own are not touched."""
    with tempfile.TemporaryDirectory() as folder:
        index, objects = Path(folder, "index"), Path(folder, "objects")
        objects.mkdir()
        git_folder = _git(root, "rev-parse", "--absolute-git-dir") or ""
        common = _git(root, "rev-parse", "--path-format=absolute", "--git-common-dir") or git_folder
        with_index = {
            "GIT_INDEX_FILE": str(index),
            "GIT_OBJECT_DIRECTORY": str(objects),
            "GIT_ALTERNATE_OBJECT_DIRECTORIES": f"{common}/objects",
        }
        users_index = root / (_git(root, "rev-parse", "--git-path", "index") or "index")
        if users_index.is_file():
            shutil.copyfile(users_index, index)
        _git_bytes(root, "add", "--update", environment=with_index)
        if untracked:
            listing = b"\0".join(map(os.fsencode, untracked))
            _git_bytes(
                root, "--literal-pathspecs", "add", "--pathspec-from-file=-", "--pathspec-file-nul",
                environment=with_index, stdin=listing,
            )  # fmt: skip
        return _git_bytes(root, "diff", "--cached", "--binary", "HEAD", environment=with_index) or b""


def _git(folder: Path, *words: str) -> str | None:
    found = _git_bytes(folder, *words)
    return None if found is None else os.fsdecode(found).strip()


def _git_bytes(
    folder: Path, *words: str, environment: Mapping[str, str] | None = None, stdin: bytes = b""
) -> bytes | None:
    """Git's answer, ``None`` where it has none: a record is worth having, never worth failing for."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words],
            input=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=_GIT_TIMEOUT_S,
            check=False,
            env=os.environ | dict(environment or {}),
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _replace_folder(new: Path, old: Path) -> None:
    """Puts one folder in the place of another; a reader sees one of them, or for a moment none."""
    aside = old.with_name(f".{old.name}.{os.getpid()}.{time.time_ns()}.old")
    if old.exists():
        os.replace(old, aside)
    os.replace(new, old)
    shutil.rmtree(aside, ignore_errors=True)
