"""DeepSpeed's own files: which there are, and which slices of which weights each of them holds.

Source: files written by DeepSpeed 0.8 to 0.19.8 (stages 0 to 3, fp32, bf16 and fp16). ``mp_rank_00_model_states.pt``
(or one ``zero_pp_rank_R_...`` per rank in stage 3) names parameters and holds buffers and frozen parameters;
``*zero_pp_rank_R_mp_rank_00_optim_states.pt`` hold the fp32 master weights and the optimiser's state of them, cut as
``layout`` says.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from piip_scale.checkpoint import layout
from piip_scale.checkpoint.dtypes import FLOAT32
from piip_scale.checkpoint.folders import MODEL_FILES, OPTIMIZER_FILES, find_files, is_alone
from piip_scale.checkpoint.slices import Slice
from piip_scale.checkpoint.stored import StoredFile, StoredSlice, Weight, whole_weight
from piip_scale.checkpoint.stored_tensor import StoredTensor
from piip_scale.checkpoint.unpickling import Fragment
from piip_scale.errors import CheckpointError

_RANK = re.compile(r"rank_(\d+)[_.]")
# Of models that are cut in other ways too, each by a word in its files' names.
_OTHER_KINDS = {"expert_": "a mixture of experts", "expp_": "a mixture of experts", "layer_": "pipeline parallelism"}
_PER_RANK = "pp_rank_"
_RANKS_SHOWN = 4
_MOST_RANKS = 1 << 16
_Value = TypeVar("_Value")


class Share(Protocol):
    """Has one process look for all that open a checkpoint together, and gives each what it found."""

    def __call__(self, look: Callable[[], _Value], /) -> _Value:
        """What ``look`` returns, on one process."""


def each_itself(look: Callable[[], _Value], /) -> _Value:
    """For a process that opens a checkpoint by itself."""
    return look()


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
    def open(cls, path: Path, allowed: Collection[str] = ()) -> DeepSpeedFiles:
        """Finds the files: in a folder, in one folder (the tag) inside it, or a file of model states by itself.

        Args:
            path: The folder, or the file.
            allowed: Classes whose objects the files may hold beside what is read, as ``argparse.Namespace``.

        Raises:
            CheckpointError: Files are missing or cannot be read safely.
        """
        folder = path if is_alone(path) else find_files(path)
        models, optimizers = _open(folder, MODEL_FILES, allowed), _open(folder, OPTIMIZER_FILES, allowed)
        if folder.is_file():
            models = (StoredFile(folder, allowed),)
        _check_kind([*models, *optimizers])
        with _in_their_layout(folder):
            stage = _stage(models, optimizers)
            # What somebody took out of a checkpoint, to share the weights, may hold nothing else.
            num_ranks = int(models[0].get("dp_world_size")) if optimizers else models[0].get().get("dp_world_size", 1)
            files = cls(folder, models, optimizers, stage, int(num_ranks))
            files._check_ranks()
        return files

    @property
    def step(self) -> int:
        """Optimiser steps behind them, as DeepSpeed counts; 0 where they do not say."""
        step = self._model.get("global_steps", 0)
        return step if type(step) is int and step >= 0 else 0

    @property
    def leaves_out_frozen(self) -> bool:
        """Whether what was frozen is in none of them: saved so (``exclude_frozen_parameters``), or by DeepSpeed 0.8."""
        # Below stage 2 DeepSpeed writes none apart either, but has them among the model's own.
        key = "frozen_param_fragments"
        return (self.stage >= 2 and self._model.get(key, {}) is None) or (self.stage == 3 and key not in self._model)

    @property
    def lacks_masters(self) -> bool:
        """Whether trained weights are only there as the model computed with them, in 16 bits."""
        module = self._model.get("module", {}) if self.stage == 0 else {}
        halves = [value for value in module.values() if value.dtype.is_floating_point and value.dtype.itemsize == 2]
        return bool(halves)

    @property
    def _model(self) -> dict[str, Any]:
        content: dict[str, Any] = self.models[0].get()
        return content

    def weights(
        self, left_out: Collection[str] = (), given: Mapping[str, Weight] | None = None, share: Share = each_itself
    ) -> dict[str, Weight]:
        """Every weight, in the order of the model's state dict.

        Args:
            left_out: Names of those that are not in the files.
            given: What takes their places; without, they are absent.
            share: As of ``ZeroCheckpoint``.

        Raises:
            CheckpointError: The files do not fit together, or hold no values of a weight.
        """
        with _in_their_layout(self.folder):
            return self._weights(set(left_out), given or {}, share)

    def _weights(self, left_out: Collection[str], given: Mapping[str, Weight], share: Share) -> dict[str, Weight]:
        model = self.models[0]
        every: dict[str, StoredTensor] = model.get("module")
        _check_module(model, every)
        if not self.stage:
            self._check_not_cut(every)
        module = {name: value for name, value in every.items() if name not in left_out}
        buffers = set(self._model.get("buffer_names") or ())
        found = self._masters(share) if self.stage else _trained_whole(model)
        found |= self._frozen(left_out) if self.stage == 3 else {}
        found |= {n: whole_weight(model, n, "module", n, is_buffer=True) for n in module if n in buffers}
        unknown = [name for name in found if name not in module]
        if unknown:
            raise CheckpointError(f"{model.path}: the model has no {unknown[0]}", fix="take another checkpoint")
        found |= self._untrained({name: value for name, value in module.items() if name not in found}, module, found)
        _check_whole(self.folder, found)
        found |= given
        return {name: found[name] for name in every if name in found}

    def _untrained(
        self, left: dict[str, StoredTensor], module: dict[str, StoredTensor], found: dict[str, Weight]
    ) -> dict[str, Weight]:
        # A parameter under a second name: its master is under the first. DeepSpeed's own list of these misses modules
        # that are registered twice, but the pickle keeps that both are one storage, empty in stage 3.
        first_names = {module[name]: name for name in reversed(found)}
        twins = {name: found[first_names[value]] for name, value in left.items() if value in first_names}
        alone = [name for name in left if name not in twins]
        if self.stage < 3:
            return twins | {name: whole_weight(self.models[0], name, "module", name) for name in alone}
        if alone and not self.leaves_out_frozen:
            raise CheckpointError(
                f"{self.models[0].path} names {alone[0]} and no file holds it",
                rule="every parameter is trained, frozen, or another name of one that is",
                fix="save without exclude_frozen_parameters",
            )
        return twins

    def _masters(self, share: Share) -> dict[str, Weight]:
        """The trained parameters."""
        key = "fp32_flat_groups" if self.stage == 3 else "single_partition_of_fp32_groups"
        root = ("optimizer_state_dict", key)
        inner = "optimizer_state_dict" if self.stage == 3 else "base_optimizer_state"
        states = ("optimizer_state_dict", inner, "state")
        shapes: list[dict[str, tuple[int, ...]]] = self.models[0].get("param_shapes")
        # Below stage 3 each rank's file says what it holds: for ranks that all look, ranks times ranks files.
        look = each_itself if self.stage == 3 else share
        slices = look(lambda: self._slices(shapes, root))
        return {
            name: Weight(tuple(shape), FLOAT32, False, self._stored(slices[name], root, states))
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
        config = self._model.get("ds_config") or {}
        if config.get("zero_optimization", {}).get("round_robin_gradients"):
            raise CheckpointError(
                f"{self.folder} was saved with round_robin_gradients and does not say where each parameter is",
                fix="save it with a DeepSpeed version that writes param_slice_mappings",
            )

    def _stored(self, slices: list[Slice], root: tuple[str, ...], states: tuple[str, ...]) -> tuple[StoredSlice, ...]:
        return tuple(
            StoredSlice(part, self.optimizers[part.rank], (*root, part.group), (*states, part.group)) for part in slices
        )

    def _frozen(self, left_out: Collection[str]) -> dict[str, Weight]:
        """Stage 3's frozen parameters: each rank holds a flat part of the same length."""
        weights = {}
        # None where nothing is frozen, or where frozen parameters were left out of the checkpoint.
        shapes = self._model.get("frozen_param_shapes") or {}
        for name, shape in ((name, shape) for name, shape in shapes.items() if name not in left_out):
            keys = ("frozen_param_fragments", name)
            held = self.models[0].tensor(*keys)
            slices = layout.slices_of_parts(name, layout.num_elements(shape), held.numel, len(self.models))
            parts = tuple(StoredSlice(part, self.models[part.rank], keys) for part in slices)
            weights[name] = Weight(tuple(shape), held.dtype, False, parts)
        return weights

    def _check_not_cut(self, module: Mapping[str, StoredTensor]) -> None:
        """Refuses a file of stage 3 that was taken out of its folder, and with its name lost what says so."""
        named = [*(self._model.get("param_shapes") or ()), self._model.get("frozen_param_shapes") or {}]
        shapes = {name: tuple(shape) for part in named for name, shape in part.items()}
        cut = [name for name, value in module.items() if shapes.get(name, value.shape) != value.shape]
        if cut:
            raise CheckpointError(
                f"{self.folder} holds nothing of {len(cut)} weights, {cut[0]} among them",
                rule="ZeRO stage 3 keeps what it cuts in the files of the optimiser's states",
                fix="give the folder that it was taken from",
            )

    def _check_ranks(self) -> None:
        if self._model.get("mp_world_size", 1) != 1:
            raise CheckpointError(
                f"{self.folder} was saved with tensor parallelism", rule="only data parallel ranks are read"
            )
        wanted = {"model": self.num_ranks if self.stage == 3 else 1, "optimizer": self.num_ranks if self.stage else 0}
        for kind, files in (("optimizer", self.optimizers), ("model", self.models)):
            if self.folder.is_dir() and [_rank(file.path) for file in files] != list(range(wanted[kind])):
                raise CheckpointError(
                    f"{self.folder} has {len(files)} files of {kind} states{_odd_ranks(files, wanted[kind])}",
                    rule=f"ZeRO stage {self.stage} on {self.num_ranks} ranks writes {wanted[kind]}",
                    fix="copy the missing files here, or take another checkpoint",
                )


@contextlib.contextmanager
def _in_their_layout(folder: Path) -> Iterator[None]:
    """One line for files whose content is not what DeepSpeed writes: keys that are absent, or of another type."""
    try:
        yield
    except (AttributeError, TypeError, ValueError, KeyError, IndexError, OverflowError) as error:
        raise CheckpointError(
            f"{folder} is not in the layout of a DeepSpeed checkpoint: {type(error).__name__}: {error}",
            rule="this version reads the files of DeepSpeed 0.8 to 0.19",
            fix="take another checkpoint",
        ) from error


def _check_module(file: StoredFile, module: Mapping[str, StoredTensor]) -> None:
    if not (isinstance(module, Mapping) and module):
        raise CheckpointError(f"{file.path} names no tensors of a model", fix="take another checkpoint")
    for name, value in module.items():
        if not isinstance(value, StoredTensor):
            raise CheckpointError(f"{file.path}: {name!r} of the model is no plain tensor")
        # They become keys of a safetensors header, where one name is taken, and parts of messages.
        if not (isinstance(name, str) and name and name.isprintable() and name != "__metadata__"):
            raise CheckpointError(f"{file.path}: a tensor's name", value=name, rule="printable text, no __metadata__")


def _lengths(file: StoredFile, root: tuple[str, ...]) -> list[int]:
    """Elements of each flat tensor of master weights."""
    flats = [file.tensor(*root, index) for index in range(len(file.get(*root)))]
    for index, flat in enumerate(flats):
        if flat.dtype != FLOAT32 or len(flat.shape) != 1:
            raise CheckpointError(
                f"{file.path}: flat tensor {index} of master weights",
                value=(flat.dtype.name, flat.shape),
                rule="float32 and 1-D",
                fix="take another checkpoint",
            )
    return [flat.numel for flat in flats]


def _ranges(mappings: Sequence[Mapping[str, Fragment]]) -> list[dict[str, tuple[int, int]]]:
    """Start and length in its flat tensor of each parameter that a rank has a part of, by group."""
    return [{name: (int(part.start), int(part.numel)) for name, part in group.items()} for group in mappings]


def _open(folder: Path, pattern: str, allowed: Collection[str]) -> tuple[StoredFile, ...]:
    """The files of all ranks, in the order of ranks."""
    return tuple(
        StoredFile(path, allowed) for path in sorted(folder.glob(pattern), key=lambda path: (_rank(path), path))
    )


def _stage(models: Sequence[StoredFile], optimizers: Sequence[StoredFile]) -> int:
    if not optimizers:
        # Only stage 3 writes a file of model states a rank.
        return 3 if any(_PER_RANK in file.path.name for file in models) else 0
    # With bf16 and fp32 gradients stage 1 is an optimiser of its own, which writes the same but not the stage.
    return int(optimizers[0].get("optimizer_state_dict").get("zero_stage", 1))


def _rank(path: Path) -> int:
    """The data parallel rank in a file's name."""
    match = _RANK.search(path.name)
    return int(match[1]) if match else 0


def _odd_ranks(files: Sequence[StoredFile], wanted: int) -> str:
    """Which ranks have no file, or several."""
    held = [_rank(file.path) for file in files]
    missing = [str(rank) for rank in range(min(wanted, _MOST_RANKS)) if rank not in held]
    double = sorted({str(rank) for rank in held if held.count(rank) > 1})
    return "".join(
        f", {word} of rank {', '.join(ranks[:_RANKS_SHOWN])}"
        for word, ranks in (("none", missing), ("several", double))
        if ranks
    )


def _check_kind(files: Sequence[StoredFile]) -> None:
    for file in files:
        kind = next((kind for word, kind in _OTHER_KINDS.items() if word in file.path.name), None)
        if kind is not None:
            raise CheckpointError(f"{file.path} is of {kind}", rule="only models whose ranks differ in data are read")


def _check_whole(folder: Path, found: Mapping[str, Weight]) -> None:
    for name, weight in found.items():
        if weight.numel != math.prod(weight.shape):
            raise CheckpointError(f"{name} is not whole in {folder}", fix="take another checkpoint")


def _trained_whole(model: StoredFile) -> dict[str, Weight]:
    """Without ZeRO: the parameters of torch's own optimiser, where its groups name them, as ours do."""
    groups = (model.get().get("optimizer") or {}).get("param_groups", [])
    names = [name for group in groups for name in group.get("parameter_names", [])]
    return {
        name: whole_weight(model, name, "module", name).with_states("optimizer", "state", group=index)
        for index, name in enumerate(names)
    }
