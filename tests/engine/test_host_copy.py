"""Copies in host memory, against torch.save and torch.load as the slow way to the same."""

from __future__ import annotations

import io
from dataclasses import dataclass

import pytest
import torch

from piip_scale.engine.host_copy import HostCopies
from piip_scale.errors import CheckpointError


@dataclass
class Holder:
    name: str
    weight: torch.Tensor


def tangled() -> dict:
    """What DeepSpeed's states are like: views of one buffer, transposed ones, empty ones, tensors in objects."""
    flat = torch.arange(24, dtype=torch.bfloat16)
    weight = torch.nn.Parameter(torch.randn(3, 4))
    return {
        "views": [flat[:6].view(2, 3), flat[6:].view(3, 6).t()],
        "twice": (weight, weight),
        "object": Holder("bias", torch.tensor(3.0)),
        "empty": torch.empty(0, 5, dtype=torch.float16),
        "groups": [{"lr": 1e-3, "params": [0, 1], "shape": torch.Size([2, 3])}],
        "step": torch.tensor(7, dtype=torch.int64),
    }


def through_a_file(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False), file.getbuffer().nbytes


def flat_tensors(value) -> list[torch.Tensor]:
    return [*value["views"], *value["twice"], value["object"].weight, value["empty"], value["step"]]


def test_a_copy_is_what_a_file_would_give_back():
    original = tangled()
    copy = HostCopies().copy(original)
    loaded, num_bytes = through_a_file(original)
    for found, wanted in zip(flat_tensors(copy), flat_tensors(loaded), strict=True):
        assert found.dtype == wanted.dtype
        assert found.stride() == wanted.stride()
        assert torch.equal(found, wanted)
    assert copy["groups"] == loaded["groups"]
    assert copy["views"][0].untyped_storage()._cdata == copy["views"][1].untyped_storage()._cdata
    # Shared memory is written once: a copy that repeated it would make another file.
    assert through_a_file(copy)[1] == pytest.approx(num_bytes, abs=512)


def test_later_changes_do_not_reach_a_copy():
    original = tangled()
    copy, before = HostCopies().copy(original), through_a_file(original)[0]
    with torch.no_grad():
        for tensor in flat_tensors(original):
            tensor.fill_(1)
    original["groups"][0]["lr"] = 1.0
    assert all(torch.equal(a, b) for a, b in zip(flat_tensors(copy), flat_tensors(before), strict=True))
    assert copy["groups"][0]["lr"] == 1e-3


def test_the_next_copies_take_the_memory_of_those_before():
    copies = HostCopies()
    addresses = []
    for _ in range(3):
        copies.start()
        found = [copies.copy(tangled()), copies.copy(tangled())]
        addresses.append([t.data_ptr() for value in found for t in flat_tensors(value)])
    assert addresses[0] == addresses[1] == addresses[2]
    assert found[0]["views"][0].data_ptr() != found[1]["views"][0].data_ptr()


def test_memory_follows_a_change_of_size():
    copies = HostCopies()
    copies.copy([torch.zeros(4)])
    copies.start()
    larger = torch.randn(9)
    assert torch.equal(copies.copy([larger])[0], larger)


class Cuda:
    """Counts the bytes that are page-locked, as CUDA does."""

    def __init__(self, limit: int) -> None:
        self.locked: dict[int, int] = {}
        self._limit = limit

    def cudaHostRegister(self, address, num_bytes, flags):  # noqa: N802 - CUDA's name
        if sum(self.locked.values()) + num_bytes > self._limit:
            return 2
        self.locked[address] = num_bytes
        return 0

    def cudaHostUnregister(self, address):  # noqa: N802 - CUDA's name
        del self.locked[address]


@pytest.fixture
def cuda(monkeypatch):
    cuda = Cuda(limit=4096)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cuda)
    return cuda


def test_no_byte_more_is_page_locked_than_is_copied(cuda):
    copies = HostCopies()
    # 1025 bytes: torch's own page-locked memory would be 2048.
    copies.copy([torch.zeros(1025, dtype=torch.uint8), torch.zeros(7), torch.zeros(0)])
    assert sorted(cuda.locked.values()) == [28, 1025]
    copies.start()
    copies.copy([torch.zeros(1030, dtype=torch.uint8), torch.zeros(7), torch.zeros(0)])
    assert sorted(cuda.locked.values()) == [28, 1030]


def test_memory_that_cannot_be_locked_is_one_line_with_the_way_out(cuda):
    with pytest.raises(CheckpointError, match=r"got '5,000 bytes, CUDA error 2'; set train.background_saves=False"):
        HostCopies().copy([torch.zeros(5000, dtype=torch.uint8)])
