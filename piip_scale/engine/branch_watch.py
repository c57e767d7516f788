"""What each branch gets and gives: norms of its gradient, gammas into it, its weight in the merging.

Everything is read of the slices that this rank holds, and added up over ranks with the losses.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from piip_scale.engine.zero.deepspeed_api import Engine
from piip_scale.engine.zero.disk_offload import is_on_disk
from piip_scale.engine.zero.partitions import partitions
from piip_scale.engine.zero.update import mean_gradient
from piip_scale.models.interaction import Injection
from piip_scale.models.merging import MergePart

GRADIENT, GAMMA, MERGING = "gradient of ", "gamma into branch ", "merging weight of branch "
"""Begin the names of what is watched."""
_COUNT = "elements of "
# What no part of the model is.
_REST = "rest"
_UNIT = re.compile(r"interactions\.\d+\.(\d+)\.inject_into_(large|small)$")


class BranchWatch:
    """Reads one engine; nothing here is collective, and nothing waits for the device.

    Args:
        engine: The engine.
        parts: The model's, by name.
    """

    def __init__(self, engine: Engine, parts: Mapping[str, nn.Module]) -> None:
        self._gradient = mean_gradient(engine)
        names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
        part_of = {
            names[id(parameter)]: part
            for part, module in parts.items()
            for parameter in module.parameters()
            if parameter.requires_grad
        }
        self._parts = sorted({*part_of.values(), _REST})
        pieces = [] if self._gradient is None else list(_pieces(engine, part_of))
        # Once: a step that is written has the host make neither views nor copies of numbers.
        self._slices = [] if self._gradient is None else [self._gradient[first:end] for _, first, end in pieces]
        places = torch.tensor([self._parts.index(part) for part, _, _ in pieces], dtype=torch.int64)
        self._places = places if self._gradient is None else places.to(self._gradient.device)
        self._scales = _scales(engine, dict(_watched(engine.module)))

    def own(self, *, with_gradients: bool) -> dict[str, Tensor | float]:
        """This rank's shares of sums over ranks, by name, for ``read``; scalars on the device of what they are of.

        Args:
            with_gradients: Off where the last step's were not finite.
        """
        found: dict[str, Tensor | float] = {}
        if with_gradients and self._gradient is not None:
            found |= self._squares(self._gradient)
        for name, parts in self._scales.items():
            sums = [part.sum() if name.startswith(MERGING) else part.abs().sum() for part in parts]
            found[name] = torch.stack(sums).sum() if sums else 0.0
            found[f"{_COUNT}{name}"] = float(sum(part.numel() for part in parts))
        return found

    def _squares(self, gradient: Tensor) -> dict[str, Tensor | float]:
        if not self._slices:
            return dict.fromkeys((f"{GRADIENT}{part}" for part in self._parts), 0.0)
        norms = torch._foreach_norm(self._slices)
        squares = torch.zeros(len(self._parts), device=gradient.device)
        squares.index_add_(0, self._places, torch.stack(norms).square())
        return {f"{GRADIENT}{part}": square for part, square in zip(self._parts, squares, strict=True)}


def read(sums: Mapping[str, float], grad_norm: float) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    """Norms of gradients by part, mean absolute gammas, and merging weights, by branch.

    Args:
        sums: ``BranchWatch.own`` of all ranks, added up or averaged, which is the same here.
        grad_norm: Of the whole gradient before clipping.
    """
    squares = {name.removeprefix(GRADIENT): value for name, value in sums.items() if name.startswith(GRADIENT)}
    whole = sum(squares.values())
    if not squares.get(_REST):
        squares.pop(_REST, None)
    norms = {part: grad_norm * (square / whole) ** 0.5 for part, square in squares.items()} if whole > 0 else {}
    return norms, _means(sums, GAMMA), _means(sums, MERGING)


def _means(sums: Mapping[str, float], prefix: str) -> dict[str, float]:
    counts = {name: sums[f"{_COUNT}{name}"] for name in sums if name.startswith(prefix)}
    return {name.removeprefix(prefix): sums[name] / count for name, count in counts.items() if count}


def _pieces(engine: Engine, part_of: Mapping[str, str]) -> Iterator[tuple[str, int, int]]:
    """Part, begin and end of what belongs together in this rank's slices of the gradient, end to end."""
    start, open_piece = 0, ("", 0, 0)
    for partition in partitions(engine):
        for piece in partition.slices:
            part, first = part_of.get(piece.name, _REST), start + piece.start
            if part == open_piece[0] and first == open_piece[2]:
                open_piece = (part, open_piece[1], first + piece.length)
                continue
            if open_piece[0]:
                yield open_piece
            open_piece = (part, first, first + piece.length)
        start += partition.master.numel()
    if open_piece[0]:
        yield open_piece


def _watched(model: nn.Module) -> Iterator[tuple[str, str]]:
    """A parameter's name, and that of what it is a part of."""
    for path, module in model.named_modules():
        if isinstance(module, MergePart):
            yield f"{path}.weight", f"{MERGING}{path.rpartition('.')[2]}"
        elif isinstance(module, Injection) and (match := _UNIT.search(path)):
            yield f"{path}.attn_scale.gamma", f"{GAMMA}{int(match[1]) + (match[2] == 'small')}"


def _scales(engine: Engine, watched: Mapping[str, str]) -> dict[str, list[Tensor]]:
    """What this rank holds of each, live: nothing where it lives on a disk."""
    found: dict[str, list[Any]] = defaultdict(list, {name: [] for name in watched.values()})
    held = partitions(engine)
    if any(is_on_disk(engine, index) for index in range(len(held))):
        return {}
    for partition in held:
        flat = partition.master.detach().view(-1)
        for piece in partition.slices:
            if piece.name in watched and piece.length:
                found[watched[piece.name]].append(piece.of(flat))
    return dict(found)
