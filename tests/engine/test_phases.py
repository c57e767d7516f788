"""Passes of several micro-batches are summed, each between its own marks."""

import pytest
import torch

from piip_scale.engine import phases
from piip_scale.engine.phases import PassClock


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_passes_are_what_lies_between_their_marks(monkeypatch, micro_batches):
    times = iter([10.0 * micro + at for micro in range(micro_batches) for at in (0.0, 1.0, 4.0)])
    monkeypatch.setattr(phases.time, "perf_counter", lambda: next(times))
    clock = PassClock()
    for _ in range(3 * micro_batches):
        clock.mark(torch.device("cpu"))
    assert clock.seconds() == pytest.approx((micro_batches * 1.0, micro_batches * 3.0))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_marks_on_a_gpu_are_of_its_queue():
    clock, device = PassClock(), torch.device("cuda")
    matrix = torch.randn(4096, 4096, device=device)
    for _ in range(3):
        clock.mark(device)
        matrix = matrix @ matrix.T / 4096
    torch.cuda.synchronize()
    assert all(seconds > 0 for seconds in clock.seconds())
