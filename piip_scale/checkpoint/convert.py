"""From a sharded training checkpoint to safetensors, in memory for a few parts of parameters; needs no torch."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from piip_scale.checkpoint.averages import averaged_weights, open_averages
from piip_scale.checkpoint.copying import Copied, Job, check_reads, copy
from piip_scale.checkpoint.deepspeed_files import DeepSpeedFiles
from piip_scale.checkpoint.dtypes import BFLOAT16, FLOAT16, FLOAT32, DType
from piip_scale.checkpoint.hub_layout import file_names, split_into_files, write_index
from piip_scale.checkpoint.journal import Journal, identity_of
from piip_scale.checkpoint.left_out import Given, given_weights, left_out_of
from piip_scale.checkpoint.lora import merged
from piip_scale.checkpoint.origin import own_config
from piip_scale.checkpoint.output import Replacing, is_manifest, manifest_path
from piip_scale.checkpoint.renaming import Renaming, shared_prefix_note
from piip_scale.checkpoint.safetensors_writer import Entry, SafetensorsWriter
from piip_scale.checkpoint.store import CheckpointStore, find_checkpoint, read_step
from piip_scale.checkpoint.stored import Weight
from piip_scale.checkpoint.verifying import compare
from piip_scale.errors import CheckpointError
from piip_scale.files import disk_errors

FORMAT_VERSION = "1"

_DTYPES = {"fp32": FLOAT32, "bf16": BFLOAT16, "fp16": FLOAT16}
_NO_MANIFEST = "no manifest of ours: sizes and numbers of ranks were checked, and"
_CHECKSUMS = "the checksums that torch left in the files"
_NO_CHECKSUMS = "no checksums, of which some records have none"
_NO_FROZEN = "it was saved without frozen parameters: those of the model that were not trained are not in the file"
_NO_MASTERS = "it holds no fp32 master weights by name: what is written are the 16-bit weights the model computed with"


@dataclass(frozen=True)
class ConvertReport:
    """What a conversion did.

    Attributes:
        checkpoint: The checkpoint that was read.
        step: Its optimiser step.
        stage: ZeRO stage that wrote it.
        num_ranks: Ranks that wrote it.
        files: The safetensors files written.
        num_parameters: Elements of all parameters, shared ones once.
        num_bytes: Bytes of all tensors.
        seconds: Wall time.
        disk_seconds: Of these, until the disk said that it has all, after everything was written.
        notes: What the user should know of it, a line each.
    """

    checkpoint: Path
    step: int
    stage: int
    num_ranks: int
    files: tuple[Path, ...]
    num_parameters: int
    num_bytes: int
    seconds: float
    disk_seconds: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ConvertOptions:
    """How to convert.

    Attributes:
        dtype: Of floating-point parameters. Floating-point buffers (running statistics) are always float32.
        max_shard_gb: Largest size of a file in GB (10^9 bytes), in a folder; a larger tensor has a file of its own.
        overwrite: Replace the output where it exists.
        averaged: The running averages of the trained weights (``train.ema_decay``) instead of the weights.
        renaming: Other names for the tensors.
        allowed: Classes whose objects the files may hold beside tensors and plain values, as ``argparse.Namespace``.
        merge_lora: Put low-rank additions into the weights that they are added to, in float32 before the dtype.
        given: Reads frozen weights that a checkpoint leaves to other files.
        verify: Check every file of a checkpoint of ours against its manifest first, and compare what was written with
            the checkpoint, byte for byte, last.
    """

    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    max_shard_gb: float | None = None
    overwrite: bool = False
    averaged: bool = False
    renaming: Renaming = field(default_factory=Renaming)
    allowed: Collection[str] = ()
    merge_lora: bool = True
    given: Given | None = None
    verify: bool = False


def convert(
    checkpoint: Path,
    out: Path,
    options: ConvertOptions | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> ConvertReport:
    """Writes the weights of a checkpoint as safetensors, and a manifest with a checksum a tensor. Not collective.

    Only what is written is read. Every byte of it is held against the checksum that torch left in its file.

    Args:
        checkpoint: A checkpoint under any name, a folder of them, its ``latest``, or a run directory; or a folder that
            DeepSpeed wrote elsewhere, its tag, or one above; or a file of model states alone. Without a manifest of
            ours, sizes and numbers of ranks are checked.
        out: The file to write; with ``max_shard_gb`` a folder, laid out as the Hugging Face hub does.
        options: How.
        on_progress: Called with bytes done and bytes in all after every tensor.

    Raises:
        CheckpointError: The checkpoint is absent or damaged, ``out`` is in the way, or the disk refuses; no part of
            ``out`` exists then, and an ``out`` that was there is as it was.
    """
    start = time.monotonic()
    options = options or ConvertOptions()
    out = Path(out)
    _check_target(out, options)
    source = _Source.open(Path(checkpoint), options)
    shards = _plan(source.weights, options)
    files = _file_names(out, len(shards), options.max_shard_gb is not None)
    run = _Run(source, options, _Progress(sum(job.entry.num_bytes for shard in shards for job in shard), on_progress))
    with disk_errors(CheckpointError, f"write {out}"):
        run.write(out, shards, files)
    return ConvertReport(
        checkpoint=source.path,
        step=source.step,
        stage=source.files.stage,
        num_ranks=source.files.num_ranks,
        files=tuple(files),
        num_parameters=_num_parameters(source.weights),
        num_bytes=run.progress.total,
        seconds=time.monotonic() - start,
        disk_seconds=run.disk_seconds,
        notes=tuple(note for note in run.notes() if note),
    )


@dataclass(frozen=True)
class _Source:
    """A checkpoint that is there; ``committed`` where it has a manifest of ours."""

    path: Path
    committed: Path | None
    files: DeepSpeedFiles
    weights: Mapping[str, Weight]
    step: int

    @classmethod
    def open(cls, checkpoint: Path, options: ConvertOptions) -> _Source:
        found = find_checkpoint(checkpoint)
        if found is not None and options.verify:
            CheckpointStore(found.parent, keep=1).validate(found)
        files = DeepSpeedFiles.open(found or checkpoint, options.allowed)
        left_out = left_out_of(found or checkpoint).get("names", ())
        if left_out and options.given is None:
            raise CheckpointError(
                f"{found or checkpoint} leaves {len(left_out)} frozen weights to a file of pretrained ones",
                fix="name a reader of them in ConvertOptions.given, as the command does",
            )
        weights = files.weights(left_out, given_weights(found or checkpoint, options.given))
        if options.averaged:
            weights = averaged_weights(weights, open_averages(found or checkpoint, len(files.optimizers) or 1))
        if options.merge_lora:
            weights = merged(found or checkpoint, weights)
        names = options.renaming.apply(weights)
        renamed = {names[name]: weight for name, weight in weights.items()}
        return cls(found or files.folder, found, files, renamed, read_step(found) if found else files.step)


class _Run:
    """One conversion on its way to the disk."""

    def __init__(self, source: _Source, options: ConvertOptions, progress: _Progress) -> None:
        self._source, self._options = source, options
        self._config = own_config(source.path, with_lora=not options.merge_lora)
        self._unknown, self._taken = 0, 0
        self._journal: Journal | None = None
        self.progress = progress
        self.disk_seconds = 0.0

    def write(self, out: Path, shards: Sequence[Sequence[Job]], files: Sequence[Path]) -> None:
        """All files and the manifest; whole under their names when it returns."""
        in_folder = self._options.max_shard_gb is not None
        identity = identity_of(
            (job for shard in shards for job in shard), *files, self._options, sorted(self._metadata().items())
        )
        with Replacing(out, is_folder=in_folder, identity=identity) as replacing:
            self._journal = replacing.journal
            if in_folder:
                named = zip(files, shards, strict=True)
                write_index(replacing.path, {file.name: [job.entry for job in shard] for file, shard in named})
            done: dict[str, list[Copied]] = {}
            for shard, file in zip(shards, files, strict=True):
                target = replacing.path / file.name if in_folder else replacing.path
                done[file.name] = self._write_shard(target, shard)
            self._check(copied for shard in done.values() for copied in shard)
            replacing.write_manifest(self._manifest(done))

    def _write_shard(self, path: Path, shard: Sequence[Job]) -> list[Copied]:
        entries, journal = [job.entry for job in shard], self._journal
        goes_on = journal is not None and journal.goes_on
        with SafetensorsWriter(path, entries, self._metadata(), keep=goes_on) as writer:
            done = journal.taken(path, shard, writer.starts) if journal is not None else []
            self._taken += len(done)
            self.progress.add(sum(copied.entry.num_bytes for copied in done))
            there = {copied.entry.name for copied in done}
            jobs = {job.entry.name: job for job in shard if job.entry.name not in there}
            for copied in copy(list(jobs.values()), lambda entry, first, data: writer.write(entry.name, first, data)):
                done.append(copied)
                writer.send(copied.entry.name)
                if journal is not None:
                    journal.add(jobs[copied.entry.name], copied)
                self.progress.add(copied.entry.num_bytes)
            begun = time.monotonic()
        self.disk_seconds += time.monotonic() - begun
        if self._options.verify:
            compare(path, shard, writer.starts)
        return done

    def _check(self, done: Iterable[Copied]) -> None:
        self._unknown = check_reads(read for copied in done for read in copied.reads)
        if self._unknown and self._source.committed and not self._options.verify:
            # Records without checksums: then those of the whole files, which ours has.
            CheckpointStore(self._source.committed.parent, keep=1).validate(self._source.committed)

    def _manifest(self, done: Mapping[str, Sequence[Copied]]) -> str:
        source = self._source
        written = {copied.entry.name: (file, copied) for file, shard in done.items() for copied in shard}
        head = {
            "format": FORMAT_VERSION,
            "checkpoint": source.path.name,
            "step": source.step,
            "zero_stage": source.files.stage,
            "num_ranks": source.files.num_ranks,
            "averaged": self._options.averaged,
        }
        lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
        tensors = ",\n".join(f"  {json.dumps(name)}: {_manifest_line(*written[name])}" for name in source.weights)
        return "{\n" + "".join(f" {line},\n" for line in lines) + f' "tensors": {{\n{tensors}\n }}\n}}\n'

    def _metadata(self) -> dict[str, str]:
        """What the file says of its origin."""
        # "format" is what transformers and its kin look for.
        origin = {"format": "pt", "piip_scale_format": FORMAT_VERSION, "step": str(self._source.step)}
        origin |= {"averaged": "true"} if self._options.averaged else {}
        return origin | ({"config": self._config.text} if self._config.text else {})

    def notes(self) -> list[str]:
        """What the user should know."""
        files = self._source.files
        checksums = _NO_CHECKSUMS if self._unknown else _CHECKSUMS
        return [
            "" if self._source.committed else f"{_NO_MANIFEST} {checksums}",
            _NO_FROZEN if files.leaves_out_frozen else "",
            _NO_MASTERS if files.lacks_masters else "",
            f"{self._taken} tensors were there of a conversion that was killed, and are as they were noted"
            if self._taken
            else "",
            shared_prefix_note(list(self._source.weights)),
            self._config.note,
        ]


def _manifest_line(file: str, copied: Copied) -> str:
    entry = copied.entry
    crc = f"{copied.crc32:08x}"
    return json.dumps({"file": file, "dtype": entry.dtype.code, "shape": list(entry.shape), "crc32": crc})


class _Progress:
    def __init__(self, total: int, report: Callable[[int, int], None] | None) -> None:
        self.total, self._done, self._report = total, 0, report

    def add(self, num_bytes: int) -> None:
        self._done += num_bytes
        if self._report is not None and num_bytes:
            self._report(self._done, self.total)


def _check_target(out: Path, options: ConvertOptions) -> None:
    max_shard_gb = options.max_shard_gb
    if max_shard_gb is not None and not max_shard_gb > 0:
        raise CheckpointError("max_shard_gb cannot be", value=max_shard_gb, rule="it is a positive number of GB")
    if (max_shard_gb is None) != (out.suffix == ".safetensors"):
        raise CheckpointError(
            "the output's name does not fit",
            value=str(out),
            rule="one file ends in .safetensors; with a largest shard size the output is a folder",
        )
    there = [path for path in (out, manifest_path(out)) if path.exists() and not is_manifest(path)]
    if there and not options.overwrite:
        raise CheckpointError(f"{there[0]} exists", fix="choose another output, or replace it with --overwrite")


def _plan(weights: Mapping[str, Weight], options: ConvertOptions) -> list[list[Job]]:
    """The tensors of each file, in the model's order from file to file."""
    dtype = _DTYPES[options.dtype]
    entries = [Entry(name, weight.shape, _output_dtype(weight, dtype)) for name, weight in weights.items()]
    files = split_into_files(entries, options.max_shard_gb or math.inf)
    return [[Job(entry, weights[entry.name]) for entry in file] for file in files]


def _output_dtype(weight: Weight, dtype: DType) -> DType:
    if not weight.dtype.is_floating_point and weight.addition is None:
        return weight.dtype
    return FLOAT32 if weight.is_buffer else dtype


def _file_names(out: Path, count: int, in_folder: bool) -> list[Path]:
    if not in_folder:
        return [out]
    return [out / name for name in file_names(count)]


def _num_parameters(weights: Mapping[str, Weight]) -> int:
    distinct = {id(weight): weight for weight in weights.values() if not weight.is_buffer}
    return sum(math.prod(weight.shape) for weight in distinct.values())
