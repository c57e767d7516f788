"""What a training starts from: a whole model's weights out of one file, or those of single branches."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from torch import Tensor, nn

from piip_scale.config.run import RunConfig
from piip_scale.errors import ModelError
from piip_scale.logging import get_logger
from piip_scale.models.class_layers import num_classes_of
from piip_scale.models.joined import Value, Weights
from piip_scale.models.lora import LORA
from piip_scale.models.misfits import describe_misfits, list_misfits
from piip_scale.models.pretrained import pretrained_weights
from piip_scale.models.released import from_released, is_released
from piip_scale.models.stored import SCALE, StoredWeights
from piip_scale.models.trunk import Trunk
from piip_scale.models.whole_file import WholeFile, read_whole_file, require_classes
from piip_scale.tasks.base import TrainableModel

_RESET_CLASSES = "add --set 'model.reset=[\"classes\"]': the layers of the classes then start afresh"
_RESET_HEADS = (
    "use the config of the run that it comes from, or add --set 'model.reset=[\"heads\"]': then the network alone is "
    "taken, and neck and heads start afresh"
)


@dataclass(frozen=True)
class StartWeights:
    """Values for a model.

    Attributes:
        tensors: By the model's own names and in its shapes, mapped where possible; what has none starts afresh. What
            the model stores in 8 bits is made so when it is asked for.
        notes: What the user should know of them, a line each.
    """

    tensors: Mapping[str, Tensor]
    notes: tuple[str, ...] = ()


def start_weights(model: nn.Module, config: RunConfig) -> StartWeights:
    """The weights that a run's config names files for.

    ``model.pretrained`` is a file of the whole model, which `convert` or `weights import` wrote or that the released
    code did, or of its network alone; the files of single branches are not read then. Not collective.

    Args:
        model: A ``TrainableModel`` before it is sharded, on any device; nothing of it changes.
        config: The run.

    Raises:
        ModelError: A file is absent or not readable, or does not fit the model, or was trained on other classes and
            ``model.reset`` does not say that their layers start afresh.
    """
    if config.model.pretrained is not None:
        return _Start(model, config, Path(config.model.pretrained)).weights()
    found: dict[str, Value] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, Trunk):
            found |= pretrained_weights(module).below(f"{prefix}." if prefix else "")
    return StartWeights(StoredWeights(model, Weights(found)))


def check_start_weights(model: nn.Module, config: RunConfig) -> None:
    """Raises what ``start_weights`` would of a file of the whole model; reads no values.

    Args:
        model: As there.
        config: The run.

    Raises:
        ModelError: As there.
    """
    if config.model.pretrained is not None:
        start_weights(model, config)


class _Start:
    """One file's way into one model."""

    def __init__(self, model: nn.Module, config: RunConfig, path: Path) -> None:
        self._model, self._config, self._path = cast(TrainableModel, model), config, path
        self._state: dict[str, Tensor] = model.state_dict()
        heads = next(name for name, module in model.named_modules() if module is self._model.heads_module())
        self._prefix = f"{heads}."
        self._heads = {name for name in self._state if name.startswith(self._prefix)}
        self._network = [name for name in self._state if name not in self._heads]

    def weights(self) -> StartWeights:
        file = read_whole_file(self._path)
        found = self._by_our_names(file)
        notes, afresh = self._afresh(found, file)
        afresh |= {n for n in self._network if (LORA in n or n.endswith(SCALE)) and n not in found}
        kept = {name: tensor for name, tensor in found.items() if name not in afresh}
        if self._heads <= afresh:
            kept = {name: tensor for name, tensor in kept.items() if name in self._state}
        self._check(kept, [name for name in self._state if name not in afresh])
        return StartWeights(StoredWeights(cast(nn.Module, self._model), kept), (*self._notes_on_branches(), *notes))

    def _by_our_names(self, file: WholeFile) -> dict[str, Tensor]:
        if is_released(file.tensors, self._state, self._config.model):
            return from_released(file.tensors, self._state, self._config.model)
        return _with_prefix(file.tensors, self._network[0], self._inner)

    @property
    def _inner(self) -> str:
        """Name of the model's first parameter inside its network."""
        return self._network[0][self._network[0].index("branches.") :]

    def _afresh(self, found: Mapping[str, Tensor], file: WholeFile) -> tuple[list[str], set[str]]:
        """What starts afresh and lines that say so; refuses other classes that nobody gave up."""
        reset = self._config.model.reset
        if "heads" in reset or found.keys() <= set(self._network):
            return [f"{self._path} starts the network; neck and heads start afresh"], self._heads
        if "classes" not in reset:
            self._require_same_classes(found, file)
            return [], set()
        layers = self._model.class_layers()
        modules = dict.fromkeys(name.rpartition(".")[0] for name in layers)
        return [f"by model.reset the layers of the classes start afresh: {', '.join(modules)}"], set(layers)

    def _require_same_classes(self, found: Mapping[str, Tensor], file: WholeFile) -> None:
        require_classes(self._path, file.classes, self._config.data.classes, _RESET_CLASSES)
        differing = {name for name in found.keys() & self._heads if found[name].shape != self._state[name].shape}
        layers = self._model.class_layers() if differing else {}
        if differing and differing <= layers.keys():
            before, here = (
                num_classes_of(layers, {name: tensors[name].shape for name in differing})
                for tensors in (found, self._state)
            )
            raise ModelError(
                f"{self._path} was trained on other classes",
                value=before,
                rule=f"this run has {here}",
                fix=_RESET_CLASSES,
            )

    def _check(self, found: Mapping[str, Tensor], wanted: Collection[str]) -> None:
        misfits = list_misfits(found, {name: self._state[name] for name in wanted})
        if any(misfits.values()):
            in_network = any(not name.startswith(self._prefix) for names in misfits.values() for name in names)
            raise ModelError(
                f"model.pretrained={str(self._path)!r} does not fit this config's model: {describe_misfits(misfits)}",
                fix="use a config of the same network" if in_network else _RESET_HEADS,
            )

    def _notes_on_branches(self) -> list[str]:
        named = [branch.pretrained for branch in self._config.model.branches if branch.pretrained]
        if not named:
            return []
        return [f"{self._path} holds all branches: the files that {len(named)} of them name are not read"]


def _with_prefix(tensors: Mapping[str, Tensor], first: str, inner: str) -> dict[str, Tensor]:
    """A file's tensors, called as if the network were where the model has it.

    Args:
        tensors: By their names in the file: of the whole model, of its network alone, or of either inside a wrapper.
        first: Name of the model's first parameter of the network.
        inner: Its name inside the network.
    """
    here = first.removesuffix(inner)
    there = next((name.removesuffix(inner) for name in tensors if name.endswith(inner)), here)
    if there.endswith(here):
        wrapper = there.removesuffix(here)
        return {name.removeprefix(wrapper): tensor for name, tensor in tensors.items()}
    return {
        here + name.removeprefix(there) if name.startswith(there) else name: tensor for name, tensor in tensors.items()
    }


def log_notes(start: StartWeights) -> None:
    """Logs what there is to say of them."""
    for note in start.notes:
        get_logger(__name__).info(note)
