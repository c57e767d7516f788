"""Tensors out of a DeepSpeed checkpoint, in parts as small as wanted, without DeepSpeed and its pickles' code.

Source: files written by DeepSpeed 0.19.8 (stages 0 to 3, fp32 and bf16). ``mp_rank_00_model_states.pt`` (or one
``zero_pp_rank_R_...`` per rank in stage 3) names parameters and holds buffers and frozen parameters;
``*zero_pp_rank_R_mp_rank_00_optim_states.pt`` hold the fp32 master weights and the optimiser's state of them, cut as
``layout`` says. ``average/rank_R.pt`` beside their folder is ours: running averages of the masters, cut the same way.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from piip_scale.checkpoint import layout
from piip_scale.errors import CheckpointError

_MODEL_FILES = "*model_states.pt"
_OPTIMIZER_FILES = "*optim_states.pt"

AVERAGE = "average"
"""The folder of running averages, and the key in each rank's file there of a list of flat tensors, one for each of its
flat master weights."""
UPDATES = "updates"
"""Key in these files of how often they were updated."""

SWAPPED = "swapped"
"""Key in our saves' files of optimiser states, where those live on a disk: for each flat tensor that did, its elements
and where beside the file the raw ones of itself and its states are; ``None`` for the others."""

# A mapped file's pages count as this process's memory until it is unmapped: so much for all files together, but at
# least so much for each.
_MAPPED_BYTES = 64 << 20
_MAPPED_BYTES_PER_FILE = 16 << 20

_COUNTER = "step"


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
    """Consecutive elements of one (flattened) tensor of one file.

    Those of a trained parameter have ``state_keys``, under which that file keeps the optimiser's state of the tensor;
    the last of them is the tensor's number among the rank's own.
    """

    file: _File
    keys: tuple[str | int, ...]
    start: int
    length: int
    state_keys: tuple[str | int, ...] = ()
    rank: int = 0


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
        averaged: Trained parameters are their running averages instead.

    Attributes:
        num_updates: Of the averages.

    Raises:
        CheckpointError: Files are missing, cannot be read safely, or do not fit together.
    """

    def __init__(self, folder: Path, *, averaged: bool = False) -> None:
        self.folder = _find_files(Path(folder))
        models, optimizers = _open(self.folder, _MODEL_FILES), _open(self.folder, _OPTIMIZER_FILES)
        # With bf16 and fp32 gradients stage 1 is an optimiser of its own, which writes the same but not the stage.
        self.stage = int(optimizers[0].get("optimizer_state_dict").get("zero_stage", 1)) if optimizers else 0
        _check_ranks(self.folder, self.stage, models, optimizers)
        self.num_ranks = int(models[0].get("dp_world_size"))
        self.weights = _locate(self.stage, models, optimizers)
        self.num_updates = 0
        if averaged:
            files = _open_averages(Path(folder) / AVERAGE, len(optimizers) or 1)
            self.weights, self.num_updates = _averaged(self.weights, files), int(files[0].get(UPDATES))

    def __getitem__(self, name: str) -> Tensor:
        weight = self.weights[name]
        flat = torch.empty(sum(run.length for run in weight.runs), dtype=weight.dtype)
        self.copy_slice(name, 0, flat)
        return flat.view(weight.shape)

    def copy_slice(self, name: str, first: int, out: Tensor, state: str | None = None) -> None:
        """Copies consecutive elements of a flattened tensor, of which nothing else is read.

        Args:
            name: The tensor's.
            first: The first element.
            out: Takes as many as it has, 1-D, on any device; converts them to its dtype.
            state: Name of the optimiser's state, one of ``moments``, to copy instead of the weight.

        Raises:
            CheckpointError: The checkpoint does not hold them.
        """
        begin = 0
        for run in self.weights[name].runs:
            low, high = max(first, begin), min(first + out.numel(), begin + run.length)
            if low < high:
                keys = run.keys if state is None else (*run.state_keys, state)
                part = replace(run, keys=keys, start=run.start + low - begin, length=high - low)
                run.file.copy_into(out[low - first : high - first], part)
            begin += run.length

    def moments(self, name: str) -> list[str]:
        """Names of the optimiser's states of a trained parameter's shape; empty before its first step."""
        return [key for key, value in self._state(name).items() if key != _COUNTER and torch.is_tensor(value)]

    def counter(self, name: str) -> Tensor | float:
        """Steps that the optimiser counted for a trained parameter, as it keeps them."""
        value: Tensor | float = self._state(name)[_COUNTER]
        return value

    def _state(self, name: str) -> dict[str, Any]:
        run = self.weights[name].runs[0]
        *parents, own = run.state_keys
        state: dict[str, Any] = run.file.get(*parents).get(own, {})
        return state

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
                content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
                _attach_swapped(content, path.parent)
                return content
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path} cannot be read: {reason}", fix="take another checkpoint") from error
    raise CheckpointError(
        f"{path} holds objects that could run code when read",
        value=sorted(unsafe),
        rule="only tensors, plain Python values and DeepSpeed's own records are read",
        fix="save such objects as plain values or tensors",
    )


def _attach_swapped(content: Any, folder: Path) -> None:
    """Puts tensors that were on a disk into the places where the file has empty ones; mapped, not read."""
    for index, swapped in enumerate(content.get(SWAPPED, ())):
        if swapped is None:
            continue
        numel, place = swapped
        optimizer = content["optimizer_state_dict"]
        optimizer["fp32_flat_groups"][index] = _raw(folder / f"{place}.tensor.swp", numel)
        states = optimizer["optimizer_state_dict"]["state"].get(index, {})
        for key in [key for key, value in states.items() if torch.is_tensor(value) and value.numel() == 0]:
            states[key] = _raw((folder / place).with_name(f"{key}-{Path(place).name}.tensor.swp"), numel)


def _raw(path: Path, numel: int) -> Tensor:
    return torch.from_file(str(path), shared=False, size=numel, dtype=torch.float32)


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
        match = re.search(r"rank_(\d+)[_.]", path.name)
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
    found = _masters(stage, models[0], optimizers) if stage else _trained_whole(models[0])
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
    states = ("optimizer_state_dict", "optimizer_state_dict" if stage == 3 else "base_optimizer_state", "state")
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
            tuple(
                _Run(optimizers[p.rank], (*root, p.group), p.start, p.length, (*states, p.group), p.rank)
                for p in pieces[name]
            ),
        )
        for named in shapes
        for name, shape in named.items()
    }


def _trained_whole(model: _File) -> dict[str, Weight]:
    """Without ZeRO: the parameters of torch's own optimiser, where its groups name them, as ours do."""
    groups = (model.get("optimizer") or {}).get("param_groups", [])
    names = [name for group in groups for name in group.get("parameter_names", [])]
    weights = {name: model.tensor("module", name) for name in names}
    for index, (name, weight) in enumerate(weights.items()):
        runs = tuple(replace(run, state_keys=("optimizer", "state", index)) for run in weight.runs)
        weights[name] = replace(weight, runs=runs)
    return weights


def _averaged(weights: dict[str, Weight], files: list[_File]) -> dict[str, Weight]:
    """The same tensors, trained parameters from the files of averages: there they are cut as the masters are."""

    def averaged(run: _Run) -> _Run:
        if not run.state_keys:
            return run
        return replace(run, file=files[run.rank], keys=(AVERAGE, run.state_keys[-1]), state_keys=())

    # A parameter's two names keep sharing one weight.
    distinct = {id(weight): weight for weight in weights.values()}
    made = {key: replace(weight, runs=tuple(map(averaged, weight.runs))) for key, weight in distinct.items()}
    return {name: made[id(weight)] for name, weight in weights.items()}


def _open_averages(folder: Path, wanted: int) -> list[_File]:
    files = _open(folder, "rank_*.pt")
    if len(files) < wanted:
        raise CheckpointError(
            f"{folder} has {len(files) or 'no'} files of averaged weights",
            rule=f"a run with train.ema_decay writes {wanted} of them",
            fix="leave out --ema, or take a checkpoint of such a run",
        )
    return files


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
