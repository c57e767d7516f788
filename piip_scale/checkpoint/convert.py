"""From a sharded training checkpoint to safetensors, in memory for one parameter."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from piip_scale.checkpoint.deepspeed_files import find_files
from piip_scale.checkpoint.origin import own_config
from piip_scale.checkpoint.safetensors_writer import Entry, SafetensorsWriter, in_file_order
from piip_scale.checkpoint.store import CheckpointStore, find_checkpoint, read_step
from piip_scale.checkpoint.stored import Weight
from piip_scale.checkpoint.zero_reader import ZeroCheckpoint
from piip_scale.errors import CheckpointError
from piip_scale.files import disk_errors, sync_file

FORMAT_VERSION = "1"
INDEX = "model.safetensors.index.json"

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_NO_MANIFEST = "no manifest of ours: sizes and numbers of ranks were checked, checksums could not be"
_NO_FROZEN = "it was saved without frozen parameters: those of the model that were not trained are not in the file"
_GB = 10**9  # as the Hugging Face hub counts shards


@dataclass(frozen=True)
class ConvertReport:
    """What a conversion did.

    Attributes:
        checkpoint: The checkpoint that was read.
        step: Its optimiser step.
        files: The safetensors files written.
        num_parameters: Elements of all parameters, shared ones once.
        num_bytes: Bytes of all tensors.
        seconds: Wall time.
        notes: What the user should know of it, a line each.
    """

    checkpoint: Path
    step: int
    files: tuple[Path, ...]
    num_parameters: int
    num_bytes: int
    seconds: float
    notes: tuple[str, ...] = ()


def convert(
    checkpoint: Path,
    out: Path,
    *,
    dtype: Literal["fp32", "bf16"] = "fp32",
    max_shard_gb: float | None = None,
    overwrite: bool = False,
    averaged: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> ConvertReport:
    """Writes the weights of a checkpoint as safetensors. Not collective.

    Args:
        checkpoint: A checkpoint under any name, a folder of them, its ``latest``, or a run directory; or a folder that
            DeepSpeed wrote elsewhere, its tag, or the one above. Without a manifest of ours, sizes and numbers of ranks
            are checked, and no checksums.
        out: The file to write; with ``max_shard_gb`` a folder, laid out as the Hugging Face hub does.
        dtype: Of floating-point parameters. Floating-point buffers (running statistics) are always float32.
        max_shard_gb: Largest size of a file in GB (10^9 bytes); a larger tensor has a file of its own.
        overwrite: Replace ``out`` where it exists.
        averaged: Write the running averages of the trained weights (``train.ema_decay``) instead of the weights.
        on_progress: Called with bytes done and bytes in all after every tensor.

    Raises:
        CheckpointError: The checkpoint is absent or damaged, ``out`` is in the way, or the disk refuses; no part of
            ``out`` exists then, and an ``out`` that was there is as it was.
    """
    start = time.monotonic()
    out = Path(out)
    _check_target(out, max_shard_gb, overwrite)
    found = find_checkpoint(Path(checkpoint))
    if found is not None:
        CheckpointStore(found.parent, keep=1).validate(found)
    source = found or find_files(Path(checkpoint))
    reader = ZeroCheckpoint(source, averaged=averaged)
    step = read_step(found) if found else reader.step
    config = own_config(source)
    shards = _plan(reader, _DTYPES[dtype], max_shard_gb)
    files = _file_names(out, len(shards), max_shard_gb is not None)
    progress = _Progress(sum(entry.num_bytes for shard in shards for entry in shard), on_progress)
    with disk_errors(CheckpointError, f"write {out}"), _Replacing(out) as partial:
        if max_shard_gb is not None:
            partial.mkdir()
            _write_index(partial / INDEX, shards, files)
        for shard, file in zip(shards, files, strict=True):
            target = partial if max_shard_gb is None else partial / file.name
            _write_shard(target, shard, reader, _metadata(step, averaged, config.text), progress)
    return ConvertReport(
        checkpoint=source,
        step=step,
        files=tuple(files),
        num_parameters=_num_parameters(reader),
        num_bytes=progress.total,
        seconds=time.monotonic() - start,
        notes=tuple(note for note in (*_notes(found, reader), config.note) if note),
    )


def _notes(committed: Path | None, reader: ZeroCheckpoint) -> list[str]:
    return ([] if committed else [_NO_MANIFEST]) + ([_NO_FROZEN] if reader.leaves_out_frozen else [])


class _Progress:
    def __init__(self, total: int, report: Callable[[int, int], None] | None) -> None:
        self.total, self._done, self._report = total, 0, report

    def add(self, num_bytes: int) -> None:
        self._done += num_bytes
        if self._report is not None:
            self._report(self._done, self.total)


class _Replacing:
    """A hidden path beside ``out`` that takes its place when all went well, and vanishes when not."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self._partial = out.with_name(f".{out.name}.partial")
        self._old = out.with_name(f".{out.name}.replaced")

    def __enter__(self) -> Path:
        self._out.parent.mkdir(parents=True, exist_ok=True)
        _remove(self._partial)
        return self._partial

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._swap()
        finally:
            _remove(self._partial)

    def _swap(self) -> None:
        _remove(self._old)
        # A rename replaces a file in one step, but never a folder that has content: that one steps aside first.
        aside = self._out.exists() and (self._out.is_dir() or self._partial.is_dir())
        if aside:
            os.rename(self._out, self._old)
        try:
            os.replace(self._partial, self._out)
        except OSError:
            if aside:
                os.rename(self._old, self._out)
            raise
        sync_file(self._out.parent)
        _remove(self._old)


def _check_target(out: Path, max_shard_gb: float | None, overwrite: bool) -> None:
    if max_shard_gb is not None and not max_shard_gb > 0:
        raise CheckpointError("max_shard_gb cannot be", value=max_shard_gb, rule="it is a positive number of GB")
    if (max_shard_gb is None) != (out.suffix == ".safetensors"):
        raise CheckpointError(
            "the output's name does not fit",
            value=str(out),
            rule="one file ends in .safetensors; with a largest shard size the output is a folder",
        )
    if out.exists() and not overwrite:
        raise CheckpointError(f"{out} exists", fix="choose another output, or replace it with --overwrite")


def _plan(reader: ZeroCheckpoint, dtype: torch.dtype, max_shard_gb: float | None) -> list[list[Entry]]:
    """The tensors of each file, in the model's order from file to file."""
    shards: list[list[Entry]] = [[]]
    held = 0
    for name, weight in reader.weights.items():
        entry = Entry(name, weight.shape, _output_dtype(weight, dtype))
        if max_shard_gb is not None and shards[-1] and held + entry.num_bytes > max_shard_gb * _GB:
            shards.append([])
            held = 0
        shards[-1].append(entry)
        held += entry.num_bytes
    return [in_file_order(shard) for shard in shards]


def _output_dtype(weight: Weight, dtype: torch.dtype) -> torch.dtype:
    if not weight.dtype.is_floating_point:
        return weight.dtype
    return torch.float32 if weight.is_buffer else dtype


def _file_names(out: Path, count: int, in_folder: bool) -> list[Path]:
    if not in_folder:
        return [out]
    return [out / f"model-{index:05d}-of-{count:05d}.safetensors" for index in range(1, count + 1)]


def _write_index(path: Path, shards: list[list[Entry]], files: list[Path]) -> None:
    names = {entry.name: file.name for shard, file in zip(shards, files, strict=True) for entry in shard}
    total = sum(entry.num_bytes for shard in shards for entry in shard)
    path.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": names}, indent=2), encoding="utf-8")
    sync_file(path)


def _write_shard(
    path: Path, shard: list[Entry], reader: ZeroCheckpoint, metadata: dict[str, str], progress: _Progress
) -> None:
    with SafetensorsWriter(path, shard, metadata) as writer:
        for entry in shard:
            writer.add(reader[entry.name].to(entry.dtype))
            progress.add(entry.num_bytes)


def _metadata(step: int, averaged: bool, config: str) -> dict[str, str]:
    """What the file says of its origin."""
    # "format" is what transformers and its kin look for.
    origin = {"format": "pt", "piip_scale_format": FORMAT_VERSION, "step": str(step)}
    return origin | ({"averaged": "true"} if averaged else {}) | ({"config": config} if config else {})


def _num_parameters(reader: ZeroCheckpoint) -> int:
    distinct = {id(weight): weight for weight in reader.weights.values() if not weight.is_buffer}
    return sum(torch.Size(weight.shape).numel() for weight in distinct.values())


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
