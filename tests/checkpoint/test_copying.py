"""The bytes on their way: cast as torch casts them, summed once for two checksums, whatever their strides."""

import os
import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from piip_scale.checkpoint import copying, crc, safetensors_writer
from piip_scale.checkpoint.casts import cast
from piip_scale.checkpoint.convert import ConvertOptions, convert
from piip_scale.checkpoint.dtypes import DTYPES
from piip_scale.checkpoint.zero_reader import ZeroCheckpoint


def test_tensors_that_are_not_contiguous_or_share_storage(tmp_path, monkeypatch):
    """Views of one storage, among them tied ones, transposed and of a step: as torch has them, and checksums hold."""
    monkeypatch.setattr(copying, "_CHUNK_BYTES", 40)
    base = torch.randn(12, 10)
    module = {
        "whole": base,
        "turned": base.t(),
        "stepped": base[::3, ::2],
        "inner": base[2:5],
        "again": base[2:5],
        "last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last).bfloat16(),
        "none": torch.empty(0, 4),
        "one": torch.tensor(True),
    }
    torch.save({"module": module}, tmp_path / "alone.pt")
    for dtype in ("fp32", "bf16"):
        out = tmp_path / f"{dtype}.safetensors"
        convert(tmp_path / "alone.pt", out, ConvertOptions(dtype=dtype, verify=True))
        kind = DTYPES[{"fp32": "float32", "bf16": "bfloat16"}[dtype]].to_torch()
        read = load_file(out)
        assert all(torch.equal(read[n], t.to(kind) if t.is_floating_point() else t) for n, t in module.items())
    for name, value in ZeroCheckpoint(tmp_path / "alone.pt").items():
        assert torch.equal(value, module[name])


def test_the_disk_begins_with_each_tensor_as_it_is_written(tmp_path, monkeypatch):
    """Of those larger than a request; all are whole, whenever the disk takes them."""
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(safetensors_writer, "_LEAST_SENT_BYTES", 64)
    monkeypatch.setattr(os, "posix_fadvise", lambda _, start, length, __: sent.append((start, length)))
    module = {"large": torch.randn(4, 8), "small": torch.randn(3), "edge": torch.randn(16)}
    torch.save({"module": module}, tmp_path / "alone.pt")
    out = tmp_path / "out.safetensors"
    convert(tmp_path / "alone.pt", out)
    assert sorted(length for _, length in sent) == [64, 128]
    data = out.read_bytes()
    assert {data[start : start + length] for start, length in sent} == {
        module[name].numpy().tobytes() for name in ("large", "edge")
    }


@given(parts=st.lists(st.binary(max_size=40), max_size=6))
def test_checksums_of_parts_make_that_of_the_whole(parts):
    found = 0
    for part in parts:
        found = crc.combined(found, zlib.crc32(part), len(part))
    assert found == zlib.crc32(b"".join(parts))


FLOATS = ("float32", "bfloat16", "float16")


@settings(max_examples=40, deadline=None)
@given(bits=st.lists(st.integers(0, (1 << 32) - 1), min_size=1, max_size=20), source=st.sampled_from(FLOATS))
def test_casts_round_as_torch_does(bits, source):
    values = torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32)
    values = values.to(DTYPES[source].to_torch())
    for target in set(FLOATS) - {source}:
        wanted = values.to(DTYPES[target].to_torch())
        data = values.view(torch.uint8).numpy().data
        if (values.isfinite() & ~wanted.isfinite()).any() and target == "float16":
            with pytest.raises(OverflowError):
                cast(DTYPES[source], DTYPES[target])(data)
            continue
        made = torch.frombuffer(bytearray(cast(DTYPES[source], DTYPES[target])(data)), dtype=wanted.dtype)
        # Which of many NaNs is nobody's promise.
        assert torch.equal(made.isnan(), wanted.isnan())
        assert torch.equal(made.view(torch.uint8)[~_bytes(made)], wanted.view(torch.uint8)[~_bytes(made)])


def _bytes(values):
    return values.isnan().repeat_interleave(values.element_size())
