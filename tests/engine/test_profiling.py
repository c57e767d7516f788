"""Some steps are profiled, and all are what they would be without."""

from __future__ import annotations

import gzip
import json
import logging
from types import SimpleNamespace

import pytest
import torch
from tiny_task import TinyModel, make_batch
from torch.autograd import DeviceType

from piip_scale.engine.hooks import Silence
from piip_scale.engine.profile_tables import OUTSIDE, RANGE, summarise
from piip_scale.engine.profiling import Profiling
from piip_scale.run.profiled_steps import ProfiledSteps
from piip_scale.run.run_dir import RunDirectory

STEPS = 6


class Heard(Silence):
    def __init__(self):
        self.events = []

    def event(self, step, text):
        self.events.append((step, text))


def train(folder, steps, total_steps=100):
    """Losses of every step, the weights after them, and what was said."""
    torch.manual_seed(0)
    model, heard = TinyModel().train(), Heard()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    found = steps and Profiling(model, torch.device("cpu"), RunDirectory(folder), heard, steps, 20, (100,), total_steps)
    losses = []
    for step in range(21, 21 + STEPS):
        loss = sum(value for name, value in model(make_batch(step, 2)).items() if "loss" in name)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if found:
            found.step_ends(step)
            found.step_begins(step)
        if step == total_steps:
            break
    if found:
        found.give_up(step)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    return losses, model.state_dict(), heard.events


def test_what_is_computed_is_the_same_bit_for_bit_and_the_files_are_whole(tmp_path):
    plain, weights, _ = train(tmp_path, None)
    assert list(tmp_path.iterdir()) == []
    losses, profiled_weights, events = train(tmp_path, ProfiledSteps(4, 5))
    assert losses == plain
    assert all(torch.equal(profiled_weights[name], value) for name, value in weights.items())
    text, trace = tmp_path / "profile/steps_00000024-00000025.txt", "steps_00000024-00000025.pt.trace.json.gz"
    assert sorted(path.name for path in text.parent.iterdir()) == [trace, text.name]
    names = [event["name"] for event in json.loads(gzip.decompress(text.with_name(trace).read_bytes()))["traceEvents"]]
    assert names.count(f"{RANGE}large.blocks.1") == 2
    ((step, said),) = events
    assert step == 25
    assert "the device is the CPU" in said
    (blocks,) = [line.split() for line in text.read_text().splitlines() if line.endswith(" large.blocks.*")]
    assert said.startswith("profile of steps 24 to 25: ")
    # Two blocks, called once a step each; the backward pass finds its way to them.
    assert float(blocks[4]) == 2.0
    assert float(blocks[2]) > 0
    assert float(blocks[3]) > 0


def test_an_attempt_that_ends_early_keeps_what_there_is_or_says_so(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("piip_scale"), "propagate", True)
    _, _, events = train(tmp_path, ProfiledSteps(5, 9))
    assert [step for step, _ in events] == [26]
    assert (tmp_path / "profile" / "steps_00000025-00000026.txt").exists()
    _, _, events = train(tmp_path / "late", ProfiledSteps(9, 9))
    assert events == []
    assert "--profile 9, and this attempt ended after its step 6" in caplog.text
    caplog.clear()
    train(tmp_path / "late", ProfiledSteps(4, 5), total_steps=22)
    assert [record.getMessage() for record in caplog.records] == [
        "no profile: --profile 4-5, and this attempt has 2 steps"
    ]
    assert not (tmp_path / "late").exists()


def event(name, start, end, parent=None, *, device=DeviceType.CPU, kernels=(), number=-1, of_thread=0, note=False):
    return SimpleNamespace(
        name=name,
        thread=1,
        fwd_thread=of_thread,
        sequence_nr=number,
        device_type=device,
        is_async=False,
        is_user_annotation=note,
        kernels=[SimpleNamespace(duration=duration) for duration in kernels],
        cpu_parent=parent,
        time_range=SimpleNamespace(start=start, end=end),
        self_cpu_time_total=1.0,
    )


@pytest.mark.parametrize(("ends", "verdict"), [((50, 60), "host-bound"), ((80, 95), "device-bound")])
def test_overlapping_kernels_count_once_and_go_to_their_modules(ends, verdict):
    step = event("ProfilerStep*", 0, 100, note=True)
    block = event(f"{RANGE}large.blocks.0", 10, 40, step, note=True, kernels=(1000,))
    product = event("aten::mm", 12, 14, block, kernels=(20,), number=7)
    back = event("MmBackward0", 50, 60, step, number=7, of_thread=1)
    # The engine's own range around it has its number, too.
    around = event("autograd::engine::evaluate_function: MmBackward0", 49, 61, step, number=7, of_thread=1)
    inner = event("aten::mm", 51, 52, back, kernels=(40,))
    update = event("aten::add_", 70, 72, step, kernels=(5,))
    on_device = [
        event("gemm", 0, ends[0], device=DeviceType.CUDA),
        event("nccl_gather", 40, ends[1], device=DeviceType.CUDA),
        event("ProfilerStep*", 0, 100, device=DeviceType.CUDA, note=True),
    ]
    events = [step, block, product, around, back, inner, update, *on_device]
    found = summarise(events, 1, {"large.blocks.0": "large.blocks.*"}, on_gpu=True)
    assert found.busy_us == ends[1]
    assert found.communication_us == ends[1] - 40
    assert verdict in found.verdict
    blocks = found.modules["large.blocks.*"]
    assert (blocks.forward_us, blocks.backward_us, blocks.calls) == (20, 40, 1)
    assert found.modules[OUTSIDE].total_us == 5
    assert set(found.operators) == {"gemm", "nccl_gather"}


def test_on_a_cpu_what_is_no_operator_is_python_and_waiting():
    step = event("ProfilerStep*", 0, 100, note=True)
    product = event("aten::addmm", 10, 50, step)
    inner = event("aten::copy_", 20, 30, product)
    # Of gloo's own thread, beside the computing and after it.
    exchange = event("gloo:all_reduce", 40, 60, note=True)
    verdict = summarise([step, product, inner, exchange], 1, {}, on_gpu=False).verdict
    assert "operators ran 40% of the time, 20% with communication, the rest is Python and waiting" in verdict


def test_a_gpu_without_recorded_kernels_is_not_judged():
    assert "not known" in summarise([event("ProfilerStep*", 0, 9)], 1, {}, on_gpu=True).verdict
