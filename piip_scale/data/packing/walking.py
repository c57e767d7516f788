"""Folders of images, walked to the end: links that lead back are refused, and nothing that is there is passed over."""

from __future__ import annotations

import os
import stat
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from piip_scale.data.packing.door import check_file_name
from piip_scale.data.packing.finding import IMAGE_SUFFIXES
from piip_scale.data.packing.problems import Problems
from piip_scale.errors import DataError
from piip_scale.text import printable

_STAT_THREADS = 32
_UNKNOWN = (-1, -1)


def images_under(folder: Path, name: str = "", problems: Problems | None = None) -> list[str]:
    """The images of a folder in ``folder``, or of all of it, by their paths under ``folder``, sorted.

    Args:
        folder: The folder.
        name: Of the one in it that is walked.
        problems: Takes what is wrong; raised here where not given.

    Raises:
        DataError: A file is no image, a folder cannot be read, or a link leads back to where it comes from.
    """
    gathered = problems if problems is not None else Problems()
    found = []
    for path in _files(folder, name, gathered):
        with gathered.collected("file"):
            if path.suffix.lower() not in IMAGE_SUFFIXES:
                raise DataError(
                    f"{path} is no image", rule=f"one of {', '.join(sorted(IMAGE_SUFFIXES))}", fix="remove it"
                )
            found.append(check_file_name(path.relative_to(folder).as_posix(), str(path.parent)))
    if problems is None:
        gathered.settle(str(folder))
    return sorted(found)


def _files(root: Path, name: str, problems: Problems) -> Iterator[Path]:
    folder = root / name
    # The folders that each one lies in, by what they are and not by their names.
    outside = [folder, root, *root.resolve().parents]
    above = {str(folder): frozenset(map(_identity, outside))}

    def refuse(error: OSError) -> None:
        # os.walk passes over a folder that it cannot read, and all that is in it.
        with problems.collected("file"):
            raise DataError(f"folder {error.filename} cannot be read", value=os.strerror(error.errno or 0))

    for parent, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        entered = []
        for inner in sorted(folders):
            path = Path(parent, inner)
            identity = _identity(path)
            if inner.startswith("."):
                continue
            if identity in above[parent]:
                with problems.collected("file"):
                    raise DataError(
                        f"{path} is a link to a folder above it", rule="no walk of it ends", fix="remove it"
                    )
                continue
            above[str(path)] = above[parent] | {identity}
            entered.append(inner)
        folders[:] = entered
        yield from (Path(parent, file) for file in sorted(files) if not file.startswith("."))


def _identity(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError:
        return _UNKNOWN
    return status.st_dev, status.st_ino


def file_sizes(paths: Sequence[Path], problems: Problems | None = None) -> list[int | None]:
    """Sizes of many files, in bytes; ``None`` of those that cannot be read, where ``problems`` takes that.

    Raises:
        DataError: One cannot be read.
    """
    gathered = problems if problems is not None else Problems()
    # Storage behind a network answers one question in a millisecond, and many at once in little more.
    with ThreadPoolExecutor(_STAT_THREADS) as threads:
        answers = list(threads.map(_size_or_reason, paths))
    for path, answer in zip(paths, answers, strict=True):
        if isinstance(answer, str):
            with gathered.collected("image"):
                raise DataError(f"image {printable(str(path))} cannot be read", value=answer)
    if problems is None:
        gathered.settle(f"{len(paths)} files")
    return [answer if isinstance(answer, int) else None for answer in answers]


def files_of_several_names(paths: Sequence[Path]) -> list[list[int]]:
    """Indices of paths that lead to one file, by links of either kind; files of one path are left out."""
    with ThreadPoolExecutor(_STAT_THREADS) as threads:
        identities = list(threads.map(_identity, paths))
    indices = defaultdict(list)
    for index, identity in enumerate(identities):
        if identity != _UNKNOWN:
            indices[identity].append(index)
    return [of_file for of_file in indices.values() if len(of_file) > 1]


def _size_or_reason(path: Path) -> int | str:
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        return os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
    # A pipe of an image's name would be waited for without end.
    return status.st_size if stat.S_ISREG(status.st_mode) else "it is no regular file"
