"""Between two steps that are written, watching a training on a GPU never has the host wait for the device."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from pretended import Pretended, pretended_gpus
from test_hooks import Heard, tell_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from piip_scale.engine import hooks, step
from piip_scale.engine.step import train_step
from piip_scale.engine.trainer import StepReport
from piip_scale.engine.zero import message_clock
from piip_scale.engine.zero.message_clock import MessageClock
from piip_scale.world import World

DEVICE = torch.device("cuda", 0)
aten = torch.ops.aten
READS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default}


class Queue:
    """A pretended GPU's: how much it was given, up to where the host has waited, and what for."""

    def __init__(self):
        self.given = self.seen = 0
        self.waits = []

    def wait(self, place, what):
        if place > self.seen:
            self.waits.append(what)
            self.seen = place

    def event(self, *, enable_timing):
        queue, place = self, []

        class Event:
            def record(self):
                queue.given += 1
                place.append(queue.given)

            def synchronize(self):
                queue.wait(place[-1], "an event")

            def query(self):
                return place[-1] <= queue.seen

            def elapsed_time(self, last):
                assert self.query()
                assert last.query(), "torch raises where one is not complete"
                return 1.0

        return Event()


class Reads(TorchDispatchMode):
    """Tells the queue where a value of the device is read, or copied while the host waits."""

    def __init__(self, queue):
        super().__init__()
        self.queue = queue

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(isinstance(leaf, Pretended) for leaf in tree_leaves(args)):
            self.queue.given += 1
            copied = func is aten._to_copy.default and not kwargs.get("non_blocking") and kwargs.get("device")
            if func in READS or copied:
                self.queue.wait(self.queue.given, str(func))
        return func(*args, **kwargs)


class Norm:
    def __init__(self, queue):
        self.queue = queue

    def __float__(self):
        self.queue.wait(self.queue.given, "the norm")
        return 1.0


class Engine:
    """As far as a step sees it; its forward pass waits for a message, as one that gathers does."""

    def __init__(self, queue, messages):
        self.get_global_grad_norm, self._messages = lambda: Norm(queue), messages

    def __call__(self, batch):
        with self._messages.still(DEVICE):
            mean = batch.images_BHWC.mean()
        return {"loss_a": mean, "loss_b": mean * 2, "accuracy": mean}

    def backward(self, loss):
        assert loss.device == DEVICE

    def step(self):
        pass

    def zero_optimization_stage(self):
        return 3

    def was_step_applied(self):
        return True


class Images:
    def __init__(self):
        self.images_BHWC = torch.ones(2, 8, 8, 3).to(DEVICE)
        self.infos = [SimpleNamespace(size_px=(8, 8))] * 2

    def __len__(self):
        return 2


@pytest.fixture
def queue(monkeypatch):
    queue = Queue()
    monkeypatch.setattr(torch.cuda, "Event", queue.event)
    for stream in ("current_stream", "default_stream"):
        monkeypatch.setattr(torch.cuda, stream, lambda device: 0)
    for size in ("memory_allocated", "memory_reserved", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, size, lambda device: 1)
    monkeypatch.setattr(message_clock, "is_distributed", lambda: True)
    # What ranks exchange of a step that is written is read, and waited for.
    monkeypatch.setattr(hooks, "mean_over_ranks", lambda values, _: dict.fromkeys(values, 1.0))
    with pretended_gpus(monkeypatch), Reads(queue):
        yield queue


@pytest.mark.parametrize("also_reads", [False, True])
def test_a_step_waits_once_for_its_norm_and_its_hooks_for_nothing(queue, tmp_path, monkeypatch, also_reads):
    messages, heard = MessageClock(), Heard()
    monkeypatch.setattr(step, "MESSAGES", messages)
    tell = tell_of(heard, tmp_path)
    tell._device = DEVICE
    monkeypatch.setattr(heard, "step", heard.records.append)
    for number in range(4):
        result = train_step(Engine(queue, messages), [Images(), Images()], number, 0, World())
        if also_reads:
            float(result.losses["loss_a"])
        tell.after_step(StepReport(number + 1, result, lr=0.1, seconds=1.0, wait_seconds=0.0))
    tell.at_end(4)
    read = [str(aten._local_scalar_dense.default)] * also_reads
    assert queue.waits == ["the norm", *read] * 4
    assert heard.records[0].losses == {"loss_a": 1.0, "loss_b": 2.0, "accuracy": 1.0}
    assert heard.records[0].forward_seconds == heard.records[0].backward_seconds == pytest.approx(2e-3)
