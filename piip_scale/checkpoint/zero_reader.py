"""Tensors out of a DeepSpeed checkpoint, in parts as small as wanted, without DeepSpeed and its pickles' code."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from piip_scale.checkpoint.averages import averaged_weights, num_updates, open_averages
from piip_scale.checkpoint.deepspeed_files import DeepSpeedFiles, Share, each_itself
from piip_scale.checkpoint.left_out import Given, given_weights, left_out_of
from piip_scale.checkpoint.reading import OpenFiles
from piip_scale.checkpoint.stored_tensor import StoredTensor

# Steps that the optimiser counted for a tensor, among its states.
_COUNTER = "step"
# What is converted, or goes to another device, passes through so much memory at a time.
_CHUNK_BYTES = 4 << 20


class ZeroCheckpoint(Mapping[str, Tensor]):
    """A lazy mapping from a state dict's names to tensors on the CPU, each read when asked for and not kept.

    Names, order and shapes are those of the model's own ``state_dict()``. Trained parameters come as their fp32
    masters in stages 1 to 3. In stage 0 with bf16 DeepSpeed keeps masters without names, so there the bf16 weights
    that the model computed with are what is read. Not collective: any process may read the files of all ranks. One
    thread at a time.

    Args:
        folder: Holds DeepSpeed's files, directly or in one folder (its tag).
        averaged: Trained parameters are their running averages instead.
        allowed: Classes whose objects the files may hold beside tensors and plain values.
        given: Reads frozen weights that the checkpoint leaves to other files; without, they are absent here too.
        share: Looks into the files of all ranks for those that open the checkpoint together; opening is collective
            then.

    Attributes:
        folder: That holds the files.
        stage: ZeRO stage that wrote them.
        num_ranks: Ranks that wrote them.
        step: Optimiser steps behind them, as DeepSpeed counts; 0 where they do not say.
        leaves_out_frozen: Parameters that were frozen, if there were any, are not in the files.
        weights: Where each tensor is, by name.
        num_updates: Of the averages.

    Raises:
        CheckpointError: Files are missing, cannot be read safely, or do not fit together.
    """

    def __init__(
        self,
        folder: Path,
        *,
        averaged: bool = False,
        allowed: Collection[str] = (),
        given: Given | None = None,
        share: Share = each_itself,
    ) -> None:
        files = DeepSpeedFiles.open(Path(folder), allowed)
        self.folder, self.stage, self.num_ranks = files.folder, files.stage, files.num_ranks
        self.step, self.leaves_out_frozen = files.step, files.leaves_out_frozen
        left_out = left_out_of(Path(folder)).get("names", ())
        self.weights = files.weights(left_out, given_weights(Path(folder), given), share)
        self.num_updates = 0
        self._files = OpenFiles()
        if averaged:
            averages = open_averages(Path(folder), len(files.optimizers) or 1)
            self.weights = averaged_weights(self.weights, averages)
            self.num_updates = num_updates(averages[0])

    def __getitem__(self, name: str) -> Tensor:
        weight = self.weights[name]
        flat = torch.empty(weight.numel, dtype=weight.dtype.to_torch())
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
        weight = self.weights[name]
        for stored in weight.parts:
            part = stored.slice.within(first, out.numel())
            if part is not None:
                tensor = stored.tensor(weight.dtype, state)
                self._copy(tensor, part.start, out[part.first - first :][: part.length])

    def moments(self, name: str) -> list[str]:
        """Names of the optimiser's states of a trained parameter's shape; empty before its first step."""
        return [key for key, value in self._state(name).items() if key != _COUNTER and isinstance(value, StoredTensor)]

    def counter(self, name: str) -> Tensor | float:
        """Steps that the optimiser counted for a trained parameter, as it keeps them."""
        value = self._state(name)[_COUNTER]
        if not isinstance(value, StoredTensor):
            count: float = value
            return count
        found = torch.empty(value.numel, dtype=value.dtype.to_torch())
        self._copy(value, 0, found)
        return found.view(value.shape)

    def _state(self, name: str) -> dict[str, Any]:
        part = self.weights[name].parts[0]
        *parents, own = part.state_keys
        state: dict[str, Any] = part.file.get(*parents).get(own, {})
        return state

    def _copy(self, tensor: StoredTensor, start: int, out: Tensor) -> None:
        """Fills ``out`` with a flattened tensor's elements from ``start`` on."""
        dtype = tensor.dtype.to_torch()
        if not tensor.is_contiguous:
            spread = torch.empty(tensor.span, dtype=dtype)
            self._fill(spread, tensor, 0)
            out.copy_(spread.as_strided(tensor.shape, tensor.strides).reshape(-1)[start : start + out.numel()])
        elif out.dtype == dtype and out.device.type == "cpu" and out.is_contiguous():
            self._fill(out.detach(), tensor, start)
        else:
            step = _CHUNK_BYTES // tensor.dtype.itemsize
            for done in range(0, out.numel(), step):
                chunk = torch.empty(min(step, out.numel() - done), dtype=dtype)
                self._fill(chunk, tensor, start + done)
                out[done : done + chunk.numel()].copy_(chunk)

    def _fill(self, out: Tensor, tensor: StoredTensor, element: int) -> None:
        if out.numel():
            bytes_of = out.view(torch.uint8).numpy().data
            self._files.read_elements(bytes_of, tensor, element)

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)
