"""Weights out of a DeepSpeed checkpoint, one at a time, without DeepSpeed and without its pickles' code.

Source: files written by DeepSpeed 0.19.8 (stages 0 to 3, fp32 and bf16). ``mp_rank_00_model_states.pt`` (or one
``zero_pp_rank_R_...`` per rank in stage 3) names parameters and holds buffers and frozen parameters;
``*zero_pp_rank_R_mp_rank_00_optim_states.pt`` hold the fp32 master weights, cut as ``layout`` says.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from piip_scale.checkpoint import layout
from piip_scale.errors import CheckpointError

_MODEL_FILES = "*model_states.pt"
_OPTIMIZER_FILES = "*optim_states.pt"

# A mapped file's pages count as this process's memory until it is unmapped: so much for all files together, but at
# least so much for each.
_MAPPED_BYTES = 64 << 20
_MAPPED_BYTES_PER_FILE = 16 << 20


class _Inert:
    """Stands for DeepSpeed's own objects in its pickles, of which no weight depends."""


_STAND_INS = [
    (_Inert, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Inert, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (_Inert, "deepspeed.utils.tensor_fragment.fragment_address"),
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
]


@dataclass(frozen=True)
class _Run:
    """Consecutive elements of one (flattened) tensor of one file."""

    file: _File
    keys: tuple[str | int, ...]
    start: int
    length: int


@dataclass(frozen=True)
class Weight:
    """A tensor of the model as the checkpoint holds it.

    Attributes:
        shape: Its shape in the model.
        dtype: Its stored dtype: float32 for parameters that are trained under ZeRO, else the model's own.
        is_buffer: A buffer, not a parameter.
        runs: Where its elements are, in order.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    is_buffer: bool
    runs: tuple[_Run, ...]


class ZeroCheckpoint(Mapping[str, Tensor]):
    """A lazy mapping from a state dict's names to tensors on the CPU, each read when asked for and not kept.

    Names, order and shapes are those of the model's own ``state_dict()``. Trained parameters come as their fp32
    masters in stages 1 to 3. In stage 0 with bf16 DeepSpeed keeps masters without names, so there the bf16 weights
    that the model computed with are what is read. Not collective: any process may read the files of all ranks.

    Args:
        folder: Holds DeepSpeed's files, directly or in one folder (its tag).

    Raises:
        CheckpointError: Files are missing, cannot be read safely, or do not fit together.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = _find_files(Path(folder))
        models, optimizers = _open(self.folder, _MODEL_FILES), _open(self.folder, _OPTIMIZER_FILES)
        # With bf16 and fp32 gradients stage 1 is an optimiser of its own, which writes the same but not the stage.
        self.stage = int(optimizers[0].get("optimizer_state_dict").get("zero_stage", 1)) if optimizers else 0
        _check_ranks(self.folder, self.stage, models, optimizers)
        self.num_ranks = int(models[0].get("dp_world_size"))
        self.weights = _locate(self.stage, models, optimizers)

    def __getitem__(self, name: str) -> Tensor:
        weight = self.weights[name]
        flat = torch.empty(sum(run.length for run in weight.runs), dtype=weight.dtype)
        done = 0
        for run in weight.runs:
            run.file.copy_into(flat[done : done + run.length], run)
            done += run.length
        return flat.view(weight.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


class _File:
    """One pickle, mapped into memory; unmapped, and mapped again, whenever ``max_mapped_bytes`` of it were read."""

    def __init__(self, path: Path, max_mapped_bytes: int) -> None:
        self.path, self._max_mapped_bytes = path, max_mapped_bytes
        self._content: Any = None
        self._bytes_read = 0

    def get(self, *keys: str | int) -> Any:
        """What lies under ``keys``.

        Raises:
            CheckpointError: Nothing does, or the file cannot be read.
        """
        if self._content is None:
            self._content = _load(self.path)
        value = self._content
        for key in keys:
            try:
                value = value[key]
            except (KeyError, IndexError, TypeError):
                raise CheckpointError(
                    f"{self.path} has no entry {'.'.join(map(str, keys))}",
                    rule="this version reads the files of DeepSpeed 0.19",
                ) from None
        return value

    def copy_into(self, out: Tensor, run: _Run) -> None:
        """Copies a run of elements; ``out`` is 1-D, of the run's length."""
        out.copy_(self.get(*run.keys).reshape(-1)[run.start : run.start + run.length])
        self._bytes_read += out.numel() * out.element_size()
        if self._bytes_read > self._max_mapped_bytes:
            self._content, self._bytes_read = None, 0

    def tensor(self, *keys: str | int, is_buffer: bool = False) -> Weight:
        """The whole tensor under ``keys`` as a weight."""
        value = self.get(*keys)
        run = _Run(self, keys, 0, value.numel())
        return Weight(tuple(value.shape), value.dtype, is_buffer, (run,))


def _load(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(list(_STAND_INS)):
            unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            if not unsafe:
                return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path} cannot be read: {reason}", fix="take another checkpoint") from error
    raise CheckpointError(
        f"{path} holds objects that could run code when read",
        value=sorted(unsafe),
        rule="only tensors, plain Python values and DeepSpeed's own records are read",
        fix="save such objects as plain values or tensors",
    )


def _find_files(folder: Path) -> Path:
    inside = sorted(child for child in folder.iterdir() if child.is_dir()) if folder.is_dir() else []
    holders = [place for place in (folder, *inside) if any(place.glob(_MODEL_FILES))]
    if len(holders) != 1:
        raise CheckpointError(
            f"{folder} holds {len(holders) or 'no'} DeepSpeed checkpoints",
            rule=f"its {_MODEL_FILES} lie in it or in one folder inside it",
            fix="give the folder that DeepSpeed wrote",
        )
    return holders[0]


def _open(folder: Path, pattern: str) -> list[_File]:
    """The files of all ranks, in the order of ranks."""

    def rank(path: Path) -> int:
        match = re.search(r"zero_pp_rank_(\d+)_", path.name)
        return int(match[1]) if match else 0

    paths = sorted(folder.glob(pattern), key=rank)
    share = max(_MAPPED_BYTES // max(len(paths), 1), _MAPPED_BYTES_PER_FILE)
    return [_File(path, share) for path in paths]


def _check_ranks(folder: Path, stage: int, models: list[_File], optimizers: list[_File]) -> None:
    if models[0].get("mp_world_size") != 1:
        raise CheckpointError(f"{folder} was saved with tensor parallelism", rule="only data parallel ranks are read")
    num_ranks = models[0].get("dp_world_size")
    wanted = {"model": num_ranks if stage == 3 else 1, "optimizer": num_ranks if stage else 0}
    for kind, files in (("model", models), ("optimizer", optimizers)):
        if len(files) != wanted[kind]:
            raise CheckpointError(
                f"{folder} has {len(files)} files of {kind} states",
                rule=f"ZeRO stage {stage} on {num_ranks} ranks writes {wanted[kind]}",
                fix="copy the missing files here, or take another checkpoint",
            )


def _locate(stage: int, models: list[_File], optimizers: list[_File]) -> dict[str, Weight]:
    """Every weight, in the order of the model's state dict."""
    module: dict[str, Tensor] = models[0].get("module")
    buffers = set(models[0].get("buffer_names"))
    found = _masters(stage, models[0], optimizers) if stage else {}
    if stage == 3:
        found |= _frozen_parts(models)
    found |= {name: models[0].tensor("module", name, is_buffer=True) for name in module if name in buffers}
    for name in [name for name in module if name not in found]:
        twin = next((other for other in found if module[name].is_set_to(module[other])), None)
        if twin is not None:
            # A parameter under a second name: its master is under the first. DeepSpeed's own list of these misses
            # modules that are registered twice, but the pickle keeps that both are one storage, empty in stage 3.
            found[name] = found[twin]
        elif stage < 3:
            found[name] = models[0].tensor("module", name)
        else:
            raise CheckpointError(
                f"{models[0].path} names {name} and no file holds it",
                rule="every parameter is trained, frozen, or another name of one that is",
                fix="save without exclude_frozen_parameters",
            )
    return {name: found[name] for name in module}


def _masters(stage: int, model: _File, optimizers: list[_File]) -> dict[str, Weight]:
    """The trained parameters."""
    key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    root = ("optimizer_state_dict", key)
    shapes: list[dict[str, tuple[int, ...]]] = model.get("param_shapes")
    parts = [[flat.numel() for flat in file.get(*root)] for file in optimizers[: 1 if stage == 3 else None]]
    if stage == 3:
        pieces = layout.pieces_of_cut_parameters(shapes, parts[0], len(optimizers))
    else:
        paddings = optimizers[0].get("optimizer_state_dict").get("param_alignment_paddings")
        pieces = layout.pieces_of_cut_groups(shapes, parts, paddings)
    return {
        name: Weight(
            tuple(shape),
            torch.float32,
            False,
            tuple(_Run(optimizers[p.rank], (*root, p.group), p.start, p.length) for p in pieces[name]),
        )
        for named in shapes
        for name, shape in named.items()
    }


def _frozen_parts(models: list[_File]) -> dict[str, Weight]:
    """Stage 3's frozen parameters: each rank holds a flat part of the same length."""
    weights = {}
    for name, shape in models[0].get("frozen_param_shapes").items():
        keys = ("frozen_param_fragments", name)
        part: Tensor = models[0].get(*keys)
        pieces = layout.pieces_of_part(shape.numel(), part.numel(), len(models))
        runs = tuple(_Run(models[p.rank], keys, p.start, p.length) for p in pieces)
        weights[name] = Weight(tuple(shape), part.dtype, False, runs)
    return weights
