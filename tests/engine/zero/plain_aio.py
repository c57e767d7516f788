"""DeepSpeed's disk I/O with plain reads and writes in place of its compiled extension, which takes minutes to build.

Everything above the extension is DeepSpeed's own; ``test_disk_offload.py`` runs the extension itself where it is marked
slow.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor


class PlainHandle:
    """What deepspeed 0.19.8 calls of an ``aio_handle``; a transfer happens at once, and ``wait`` counts it."""

    def __init__(self, **_options) -> None:
        self._locked: list[Tensor] = []
        self._done = 0

    def new_cpu_locked_tensor(self, numel: int, example: Tensor) -> Tensor:
        self._locked.append(torch.empty(int(numel), dtype=example.dtype))
        return self._locked[-1]

    def free_cpu_locked_tensor(self, tensor: Tensor) -> bool:
        return True

    def is_pinned(self, tensor: Tensor) -> bool:
        start = tensor.data_ptr()
        return any(
            buffer.data_ptr() <= start < buffer.data_ptr() + buffer.numel() * buffer.element_size()
            for buffer in self._locked
        )

    def async_pread(self, buffer: Tensor, path: str, offset: int) -> int:
        whole = bytearray(Path(path).read_bytes())
        buffer.view(torch.uint8).copy_(torch.frombuffer(whole, dtype=torch.uint8)[offset : offset + buffer.nbytes])
        self._done += 1
        return 0

    def async_pwrite(self, buffer: Tensor, path: str, offset: int) -> int:
        Path(path).write_bytes(buffer.contiguous().view(torch.uint8).numpy().tobytes())
        self._done += 1
        return 0

    def wait(self) -> int:
        done, self._done = self._done, 0
        return done


class PlainAio:
    aio_handle = PlainHandle


# DeepSpeed moves slices of 1 MiB and more; with these keys beside, of so many bytes.
SMALLEST_BYTES = 4096
SMALL_SLICES = {"aio": {"block_size": SMALLEST_BYTES}}


def use_plain_aio() -> None:
    """Puts it in this process in the place of the extension, and has small slices moved, too."""
    from deepspeed.ops.op_builder import AsyncIOBuilder
    from deepspeed.runtime.swap_tensor import optimizer_utils, partitioned_param_swapper

    for module in (optimizer_utils, partitioned_param_swapper):
        module.MIN_AIO_BYTES = SMALLEST_BYTES
    AsyncIOBuilder.load = lambda self, verbose=False: PlainAio
    AsyncIOBuilder.is_compatible = lambda self, verbose=False: True
