"""Opens what ``torch.save`` wrote: a zip file of a pickle, read here, and of tensors' bytes, found here.

Nothing is mapped, so a limit on address space is none on a file's size.

Source: ``torch/serialization.py`` of torch 2.15; records are stored, not compressed, each with a CRC-32 unless
``torch.serialization.set_crc32_options(False)`` left it at 0.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from piip_scale.checkpoint.stored_tensor import Storage
from piip_scale.checkpoint.unpickling import Foreign, places, unpickle
from piip_scale.errors import CheckpointError
from piip_scale.files import LACKS_MEMORY_FIX, lacks_memory

_PICKLE = "/data.pkl"
_PLACES_SHOWN = 4


def read_torch_file(path: Path, allowed: Collection[str] = ()) -> Any:
    """The content of a file, with a ``StoredTensor`` in the place of each tensor. No code of the file's is run.

    Args:
        path: The file.
        allowed: Classes whose objects the file may hold, as ``argparse.Namespace``; they are passed over.

    Raises:
        CheckpointError: It is damaged, or holds objects of other classes, or of ones that are called when read.
    """
    try:
        content, foreign = _read(path)
    except Exception as error:  # a damaged or hostile file makes the parsers raise anything
        if lacks_memory(error):
            raise CheckpointError(
                f"{path} cannot be read: no room for its description in this process's address space",
                rule="the file may well be whole",
                fix=LACKS_MEMORY_FIX,
            ) from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path} cannot be read: {reason}", fix="take another checkpoint") from error
    _refuse(path, content, [kind for kind in foreign if kind.is_called or kind.origin not in allowed])
    return content


def _refuse(path: Path, content: object, foreign: Sequence[type[Foreign]]) -> None:
    if not foreign:
        return
    held = [f"{kind.origin} in {', '.join(places(content, kind)[:_PLACES_SHOWN]) or 'another'}" for kind in foreign]
    may = [f"--allow {kind.origin}" for kind in foreign if not kind.is_called]
    passing = f"pass over plain records with {' '.join(may)}" if may and len(may) == len(foreign) else ""
    raise CheckpointError(
        f"{path} holds objects that could run code when read",
        value=sorted(held),
        rule="only tensors, plain Python values and DeepSpeed's own records are read",
        fix=passing or "save such objects as plain values or tensors",
    )


def _read(path: Path) -> tuple[Any, list[type[Foreign]]]:
    with zipfile.ZipFile(path) as archive:
        records = {record.filename: record for record in archive.infolist()}
        pickled = next(name for name in records if name.endswith(_PICKLE) and name.count("/") == 1)
        _check_order(archive, records, pickled.removesuffix(_PICKLE))
        # As stored: zipfile would check a checksum that may have been left out.
        data = _content(path, records[pickled])
    return unpickle(data, _Storages(path, records, pickled.removesuffix(_PICKLE)))


class _Storages:
    def __init__(self, path: Path, records: dict[str, zipfile.ZipInfo], root: str) -> None:
        self._path, self._records, self._root = path, records, root
        self._size = path.stat().st_size

    def __call__(self, key: str, num_bytes: int) -> Storage:
        # Looked up, never joined to a path: what a file says is none.
        record = self._records[f"{self._root}/data/{key}"]
        held = record.file_size
        if record.compress_type != zipfile.ZIP_STORED or not 0 <= num_bytes <= held:
            raise ValueError(f"record {key!r} of {held} bytes, of which {num_bytes} are wanted")
        if record.header_offset + held > self._size:
            raise ValueError(f"record {key!r} ends behind the file's end")
        return _storage(self._path, record)


def _storage(path: Path, record: zipfile.ZipInfo) -> Storage:
    return Storage(path, record.file_size, record.header_offset, has_header=True, crc32=record.CRC or None)


def _content(path: Path, record: zipfile.ZipInfo) -> bytes:
    storage = _storage(path, record)
    with path.open("rb") as file:
        file.seek(storage.start)
        data = file.read(storage.num_bytes)
    if record.compress_type != zipfile.ZIP_STORED or len(data) != storage.num_bytes:
        raise ValueError(f"its record {record.filename!r} is not whole")
    if storage.crc32 not in (None, zlib.crc32(data)):
        raise ValueError(f"its record {record.filename!r} was changed after it was saved")
    return data


def _check_order(archive: zipfile.ZipFile, records: dict[str, zipfile.ZipInfo], root: str) -> None:
    name = f"{root}/byteorder"
    if name in records and archive.open(name).read(8) != b"little":
        raise ValueError("it was written on a machine of another byte order")
