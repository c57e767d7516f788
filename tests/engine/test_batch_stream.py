import os
import signal

import pytest
import torch
from ranks import tiny_config
from tiny_task import TinyTask

from piip_scale.engine import stop
from piip_scale.engine.batch_stream import BatchStream
from piip_scale.engine.step import seed_step, total_loss
from piip_scale.engine.stop import StopFlag
from piip_scale.errors import DataError, ModelError
from piip_scale.world import World


def stream(batches: int, **train) -> BatchStream:
    config = tiny_config(train={"steps": None} | train)
    return BatchStream(TinyTask(config, World(), batches=batches), config.train, torch.device("cpu"))


def keys(stream: BatchStream, steps) -> list[list[str]]:
    return [[batch.infos[0].key for batch in stream.step(step)] for step in steps]


def test_steps_run_over_epochs_and_leave_out_the_incomplete_one():
    found = stream(7, epochs=2, gradient_accumulation=3)
    assert (found.steps_per_epoch, found.total_steps) == (2, 4)
    # The task numbers batches epoch * 7 + micro; the seventh of an epoch makes no step.
    expected = [["0_0", "1_0", "2_0"], ["3_0", "4_0", "5_0"], ["7_0", "8_0", "9_0"], ["10_0", "11_0", "12_0"]]
    assert keys(found, range(4)) == expected
    assert found.wait_seconds > 0


@pytest.mark.parametrize("first", range(9))
def test_a_stream_that_starts_anywhere_goes_on_as_the_whole(first):
    whole = keys(stream(7, steps=9, gradient_accumulation=2), range(9))
    assert keys(stream(7, steps=9, gradient_accumulation=2), range(first, 9)) == whole[first:]


def test_an_epoch_shorter_than_a_step_is_refused():
    with pytest.raises(DataError, match=r"train\.gradient_accumulation=4"):
        stream(3, epochs=1, gradient_accumulation=4)


def test_a_loader_that_ends_early_is_named():
    found = stream(4, epochs=1)
    found._task.train_batches = lambda epoch, first: iter(())
    with pytest.raises(DataError, match="ended at micro-batch 0 of epoch 0"):
        keys(found, [0])


def test_random_numbers_follow_from_the_position_alone():
    def draw(*position):
        seed_step(3, *position)
        return torch.rand(4)

    assert torch.equal(draw(5, 0, 1), draw(5, 0, 1))
    others = [draw(5, 0, 0), draw(5, 1, 1), draw(6, 0, 1), draw(1, 0, 5)]
    assert not any(torch.equal(draw(5, 0, 1), other) for other in others)


def test_the_total_sums_what_is_named_a_loss():
    losses = {"loss_box": torch.tensor(1.0), "rpn_loss": torch.tensor([2.0]), "acc": torch.tensor(90.0)}
    assert total_loss(losses).item() == 3.0
    with pytest.raises(ModelError, match="no loss"):
        total_loss({"acc": torch.tensor(1.0)})


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_sets_the_flag(number, monkeypatch):
    now_s = [100.0]
    monkeypatch.setattr(stop.time, "monotonic", lambda: now_s[0])
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)}
    flag = StopFlag()
    try:
        flag.install()
        assert not flag
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # a second delivery of the same signal, as from a terminal and a launcher
        assert flag.signal_name == number.name
        now_s[0] += 10
        if number == signal.SIGINT:
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), number)
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)
