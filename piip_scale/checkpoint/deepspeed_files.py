"""DeepSpeed's own files: which there are, and which slices of which weights each of them holds.

Source: files written by DeepSpeed 0.19.8 (stages 0 to 3, fp32 and bf16). ``mp_rank_00_model_states.pt`` (or one
``zero_pp_rank_R_...`` per rank in stage 3) names parameters and holds buffers and frozen parameters;
``*zero_pp_rank_R_mp_rank_00_optim_states.pt`` hold the fp32 master weights and the optimiser's state of them, cut as
``layout`` says.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from piip_scale.checkpoint import layout
from piip_scale.checkpoint.slices import Slice
from piip_scale.checkpoint.stored import Fragment, StoredFile, StoredSlice, Weight, whole_weight
from piip_scale.errors import CheckpointError
from piip_scale.files import disk_errors

_MODEL_FILES = "*model_states.pt"
_OPTIMIZER_FILES = "*optim_states.pt"
_LATEST = "latest"
_TAGS_SHOWN = 4
_RANK = re.compile(r"rank_(\d+)[_.]")


@dataclass(frozen=True)
class DeepSpeedFiles:
    """The files of one checkpoint.

    Attributes:
        folder: Holds them: DeepSpeed's tag.
        models: Of model states, in the order of ranks; one below stage 3.
        optimizers: Of optimiser states, in the order of ranks; none in stage 0.
        stage: ZeRO stage that wrote them.
        num_ranks: Ranks that wrote them.
    """

    folder: Path
    models: tuple[StoredFile, ...]
    optimizers: tuple[StoredFile, ...]
    stage: int
    num_ranks: int

    @classmethod
    def open(cls, folder: Path) -> DeepSpeedFiles:
        """Finds the files, directly in a folder or in one folder (the tag) inside it.

        Raises:
            CheckpointError: Files are missing or cannot be read safely.
        """
        folder = find_files(folder)
        models, optimizers = _open(folder, _MODEL_FILES), _open(folder, _OPTIMIZER_FILES)
        with _in_their_layout(folder):
            # With bf16 and fp32 gradients stage 1 is an optimiser of its own, which writes the same but not the stage.
            stage = int(optimizers[0].get("optimizer_state_dict").get("zero_stage", 1)) if optimizers else 0
            files = cls(folder, models, optimizers, stage, int(models[0].get("dp_world_size")))
            files._check_ranks()
        return files

    @property
    def step(self) -> int:
        """Optimiser steps behind them, as DeepSpeed counts; 0 where they do not say."""
        step = self.models[0].get().get("global_steps", 0)
        return step if type(step) is int and step >= 0 else 0

    @property
    def leaves_out_frozen(self) -> bool:
        """Whether they were saved with ``exclude_frozen_parameters``: what was frozen is then nowhere in them."""
        # Below stage 2 DeepSpeed writes none apart either, but has them among the model's own.
        return self.stage >= 2 and self.models[0].get().get("frozen_param_fragments", {}) is None

    def weights(self) -> dict[str, Weight]:
        """Every weight, in the order of the model's state dict.

        Raises:
            CheckpointError: The files do not fit together, or hold no values of a weight.
        """
        with _in_their_layout(self.folder):
            return self._weights()

    def _weights(self) -> dict[str, Weight]:
        model = self.models[0]
        module: dict[str, Tensor] = model.get("module")
        _check_module(model, module)
        buffers = set(model.get("buffer_names"))
        found = self._masters() if self.stage else _trained_whole(model)
        found |= self._frozen() if self.stage == 3 else {}
        found |= {n: whole_weight(model, n, "module", n, is_buffer=True) for n in module if n in buffers}
        for name in [name for name in module if name not in found]:
            found[name] = self._untrained(name, module, found)
        unknown = [name for name in found if name not in module]
        misfits = [name for name in module if name in found and found[name].numel != math.prod(found[name].shape)]
        if unknown or misfits:
            raise CheckpointError(
                f"{model.path}: the model has no {unknown[0]}"
                if unknown
                else f"{misfits[0]} is not whole in {self.folder}",
                fix="take another checkpoint",
            )
        return {name: found[name] for name in module}

    def _untrained(self, name: str, module: dict[str, Tensor], found: dict[str, Weight]) -> Weight:
        twin = next((other for other in found if module[name].is_set_to(module[other])), None)
        if twin is not None:
            # A parameter under a second name: its master is under the first. DeepSpeed's own list of these misses
            # modules that are registered twice, but the pickle keeps that both are one storage, empty in stage 3.
            return found[twin]
        if self.stage < 3:
            return whole_weight(self.models[0], name, "module", name)
        raise CheckpointError(
            f"{self.models[0].path} names {name} and no file holds it",
            rule="every parameter is trained, frozen, or another name of one that is",
            fix="save without exclude_frozen_parameters",
        )

    def _masters(self) -> dict[str, Weight]:
        """The trained parameters."""
        key = "fp32_flat_groups" if self.stage == 3 else "single_partition_of_fp32_groups"
        root = ("optimizer_state_dict", key)
        inner = "optimizer_state_dict" if self.stage == 3 else "base_optimizer_state"
        states = ("optimizer_state_dict", inner, "state")
        shapes: list[dict[str, tuple[int, ...]]] = self.models[0].get("param_shapes")
        slices = self._slices(shapes, root)
        return {
            name: Weight(tuple(shape), torch.float32, False, self._stored(slices[name], root, states))
            for named in shapes
            for name, shape in named.items()
        }

    def _slices(self, shapes: list[dict[str, tuple[int, ...]]], root: tuple[str, str]) -> dict[str, list[Slice]]:
        optimizers = self.optimizers
        if self.stage == 3:
            return layout.slices_of_cut_parameters(shapes, _lengths(optimizers[0], root), len(optimizers))
        states = [file.get("optimizer_state_dict") for file in optimizers]
        if all("param_slice_mappings" in state for state in states):
            return layout.slices_of_mappings(shapes, [_ranges(state["param_slice_mappings"]) for state in states])
        self._check_order()
        lengths = [_lengths(file, root) for file in optimizers]
        return layout.slices_of_cut_groups(shapes, lengths, states[0].get("param_alignment_paddings"))

    def _check_order(self) -> None:
        # Versions that say nowhere where a parameter is, and deal them to ranks in turns.
        config = self.models[0].get().get("ds_config") or {}
        if config.get("zero_optimization", {}).get("round_robin_gradients"):
            raise CheckpointError(
                f"{self.folder} was saved with round_robin_gradients and does not say where each parameter is",
                fix="save it with a DeepSpeed version that writes param_slice_mappings",
            )

    def _stored(self, slices: list[Slice], root: tuple[str, ...], states: tuple[str, ...]) -> tuple[StoredSlice, ...]:
        return tuple(
            StoredSlice(part, self.optimizers[part.rank], (*root, part.group), (*states, part.group)) for part in slices
        )

    def _frozen(self) -> dict[str, Weight]:
        """Stage 3's frozen parameters: each rank holds a flat part of the same length."""
        weights = {}
        # None where nothing is frozen, or where frozen parameters were left out of the checkpoint.
        for name, shape in (self.models[0].get().get("frozen_param_shapes") or {}).items():
            keys = ("frozen_param_fragments", name)
            held = self.models[0].tensor(*keys)
            slices = layout.slices_of_parts(name, shape.numel(), held.numel(), len(self.models))
            parts = tuple(StoredSlice(part, self.models[part.rank], keys) for part in slices)
            weights[name] = Weight(tuple(shape), held.dtype, False, parts)
        return weights

    def _check_ranks(self) -> None:
        if self.models[0].get("mp_world_size") != 1:
            raise CheckpointError(
                f"{self.folder} was saved with tensor parallelism", rule="only data parallel ranks are read"
            )
        wanted = {"model": self.num_ranks if self.stage == 3 else 1, "optimizer": self.num_ranks if self.stage else 0}
        for kind, files in (("model", self.models), ("optimizer", self.optimizers)):
            if len(files) != wanted[kind]:
                raise CheckpointError(
                    f"{self.folder} has {len(files)} files of {kind} states",
                    rule=f"ZeRO stage {self.stage} on {self.num_ranks} ranks writes {wanted[kind]}",
                    fix="copy the missing files here, or take another checkpoint",
                )


def find_files(folder: Path) -> Path:
    """The folder with DeepSpeed's files: the given one, the tag that its ``latest`` names, or the only one inside.

    Raises:
        CheckpointError: There is none, or there are several and none of them is the latest.
    """
    holders = [folder] if _holds(folder) else _tags(folder)
    # As Lightning does: a folder a step, the tag in it.
    holders = holders or [tag for inner in _folders(folder) for tag in _tags(inner)]
    if len(holders) != 1:
        found = f": {', '.join(holder.name for holder in holders[:_TAGS_SHOWN])}" if holders else ""
        raise CheckpointError(
            f"{folder} holds {len(holders) or 'no'} DeepSpeed checkpoints{found}",
            rule=f"its {_MODEL_FILES} lie in it or in one folder inside it",
            fix="give the folder that DeepSpeed wrote",
        )
    return holders[0]


def _tags(folder: Path) -> list[Path]:
    """The tags in a folder; only the newest where its ``latest`` names one."""
    tags = [child for child in _folders(folder) if _holds(child)]
    try:
        newest = (folder / _LATEST).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return tags
    # Compared, never joined: what a file says is not a path.
    return [tag for tag in tags if tag.name == newest] or tags


def _folders(folder: Path) -> list[Path]:
    with disk_errors(CheckpointError, f"read {folder}"):
        return sorted(child for child in folder.iterdir() if child.is_dir()) if folder.is_dir() else []


def _holds(folder: Path) -> bool:
    return any(folder.glob(_MODEL_FILES))


@contextlib.contextmanager
def _in_their_layout(folder: Path) -> Iterator[None]:
    """One line for files whose content is not what DeepSpeed writes: keys that are absent, or of another type."""
    try:
        yield
    except (AttributeError, TypeError, ValueError, KeyError, IndexError, OverflowError) as error:
        raise CheckpointError(
            f"{folder} is not in the layout of a DeepSpeed checkpoint: {type(error).__name__}: {error}",
            rule="this version reads the files of DeepSpeed 0.19",
            fix="take another checkpoint",
        ) from error


def _check_module(file: StoredFile, module: Mapping[str, Tensor]) -> None:
    if not (isinstance(module, Mapping) and module):
        raise CheckpointError(f"{file.path} names no tensors of a model", fix="take another checkpoint")
    for name, value in module.items():
        if not (isinstance(value, Tensor) and value.layout == torch.strided):
            raise CheckpointError(f"{file.path}: {name!r} of the model is no plain tensor")
        # They become keys of a safetensors header, where one name is taken, and parts of messages.
        if not (isinstance(name, str) and name and name.isprintable() and name != "__metadata__"):
            raise CheckpointError(f"{file.path}: a tensor's name", value=name, rule="printable text, no __metadata__")


def _lengths(file: StoredFile, root: tuple[str, ...]) -> list[int]:
    """Elements of each flat tensor of master weights."""
    flats = [file.tensor(*root, index) for index in range(len(file.get(*root)))]
    for index, flat in enumerate(flats):
        if flat.dtype != torch.float32 or flat.ndim != 1:
            raise CheckpointError(
                f"{file.path}: flat tensor {index} of master weights",
                value=(flat.dtype, tuple(flat.shape)),
                rule="float32 and 1-D",
                fix="take another checkpoint",
            )
    return [flat.numel() for flat in flats]


def _ranges(mappings: Sequence[Mapping[str, Fragment]]) -> list[dict[str, tuple[int, int]]]:
    """Start and length in its flat tensor of each parameter that a rank has a part of, by group."""
    return [{name: (int(part.start), int(part.numel)) for name, part in group.items()} for group in mappings]


def _open(folder: Path, pattern: str) -> tuple[StoredFile, ...]:
    """The files of all ranks, in the order of ranks."""

    def rank(path: Path) -> int:
        match = _RANK.search(path.name)
        return int(match[1]) if match else 0

    paths = sorted(folder.glob(pattern), key=rank)
    return tuple(StoredFile(path, len(paths)) for path in paths)


def _trained_whole(model: StoredFile) -> dict[str, Weight]:
    """Without ZeRO: the parameters of torch's own optimiser, where its groups name them, as ours do."""
    groups = (model.get("optimizer") or {}).get("param_groups", [])
    names = [name for group in groups for name in group.get("parameter_names", [])]
    return {
        name: whole_weight(model, name, "module", name).with_states("optimizer", "state", group=index)
        for index, name in enumerate(names)
    }
