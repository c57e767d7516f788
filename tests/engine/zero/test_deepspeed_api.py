"""The door to DeepSpeed: versions and private names are looked at before anything is trained with them."""

from __future__ import annotations

import importlib.metadata
import os
import re
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks, tiny_config
from tiny_task import TinyTask

from piip_scale.engine.session import group_timeout
from piip_scale.engine.zero import deepspeed_api
from piip_scale.errors import KernelError


@pytest.fixture
def fresh():
    deepspeed_api.load.cache_clear()
    yield
    deepspeed_api.load.cache_clear()


@pytest.mark.parametrize("library", deepspeed_api.TESTED)
def test_what_is_installed_here_is_tested_and_passes_without_a_word(library, caplog):
    found = importlib.metadata.version(library)
    deepspeed_api.check_version(library, found)
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("library", "version"), [("torch", "2.10.9"), ("deepspeed", "0.19.7"), ("deepspeed", "0.20.0"), ("torch", "1.13")]
)
def test_a_version_that_cannot_train_is_one_line_naming_what_was_tested(library, version):
    with pytest.raises(
        KernelError, match=rf"{library} {version} cannot train; .*tested with {library} [\d.]+"
    ) as caught:
        deepspeed_api.check_version(library, version)
    assert "\n" not in caught.value.line


@pytest.mark.parametrize(("library", "version"), [("torch", "2.16.0+cu140"), ("deepspeed", "0.19.9")])
def test_a_newer_version_is_one_warning_naming_what_was_tested(library, version, caplog):
    deepspeed_api.check_version(library, version)
    assert [record.getMessage().startswith(f"{library} {version} is newer than any") for record in caplog.records] == [
        True
    ]


def test_an_old_version_stops_a_run_before_deepspeed_is_used(fresh, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", {"deepspeed": "0.19.8", "torch": "2.9.1"}.__getitem__)
    with pytest.raises(KernelError, match=r"torch 2\.9\.1 cannot train"):
        deepspeed_api.load()


@pytest.mark.parametrize("name", ["deepspeed.ops:no_such_name", "deepspeed.no_such_module:name", "torch:_A.b"])
def test_a_private_name_that_is_gone_is_one_line(fresh, monkeypatch, name):
    monkeypatch.setattr(deepspeed_api, "PRIVATE_NAMES", (*deepspeed_api.PRIVATE_NAMES, name))
    with pytest.raises(
        KernelError, match=f"has no {name}; training was tested with deepspeed 0.19.8 and torch 2"
    ) as caught:
        deepspeed_api.load()
    assert "\n" not in caught.value.line


def test_every_private_name_that_is_asked_for_is_among_those_that_are_checked():
    room = Path(deepspeed_api.__file__).parent
    asked = {name for path in room.glob("*.py") for name in re.findall(r"private\(\s*\"([^\"]+)\"", path.read_text())}
    assert len(asked) > 6
    assert asked <= set(deepspeed_api.PRIVATE_NAMES)
    deepspeed_api.load()
    assert all(deepspeed_api.private(name) is not None for name in asked)


@pytest.mark.parametrize("has_public_name", [True, False])
def test_every_group_gets_the_limit_with_either_name_of_torch(monkeypatch, has_public_name):
    called = []
    world = type("World", (), {"pg_map": {"a": 1, "b": 2}})
    monkeypatch.setattr(dist.distributed_c10d, "_world", world)
    monkeypatch.setattr(dist.distributed_c10d, "_set_pg_timeout", lambda *args: called.append(args))
    monkeypatch.setattr(dist.distributed_c10d, "set_timeout", lambda *args: called.append(args), raising=False)
    if not has_public_name:
        monkeypatch.delattr(dist.distributed_c10d, "set_timeout")
    deepspeed_api.set_group_timeouts(timedelta(minutes=3))
    assert called == [(timedelta(minutes=3), "a"), (timedelta(minutes=3), "b")]


def started_with(world, device):
    from piip_scale.engine.zero.setup import init_distributed

    dist.destroy_process_group()
    init_distributed(world, timedelta(minutes=70))
    started = dist.distributed_c10d._get_default_group()._get_backend(device).options._timeout
    return started, os.environ["TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"]


def test_the_library_waits_longer_than_any_limit_of_the_run_from_the_first_message_on():
    train = tiny_config(train={"slow_hang_minutes": 60}).train
    assert group_timeout(train) > timedelta(minutes=train.slow_hang_minutes)
    assert run_ranks(1, started_with) == [(timedelta(minutes=70), str(70 * 60))]


def test_lines_that_nobody_asked_for_cost_nothing_and_others_are_said(capsys, monkeypatch):
    deepspeed_api.load()
    from deepspeed.runtime.zero import partition_parameters

    class Comm:
        @staticmethod
        def get_rank() -> int:
            print("asked")
            return 0

    monkeypatch.setattr(partition_parameters, "dist", Comm)
    partition_parameters.print_rank_0("nobody's")
    assert capsys.readouterr().out == ""
    partition_parameters.print_rank_0("somebody's", force=True)
    assert capsys.readouterr().out == "asked\nsomebody's\n"


def written_out_while_built(world, _device):
    from piip_scale.engine.zero.setup import build_engine, build_model

    written = []
    torch.Tensor.__repr__ = lambda tensor, **_: written.append(tuple(tensor.shape)) or ""
    engine, _ = build_engine(build_model(TinyTask(tiny_config(), world), 0), tiny_config(), world)
    assert str(next(engine.module.parameters())) == "Parameter containing:\n"
    return len(written), engine.zero_optimization_stage()


def test_no_parameter_is_written_out_at_start():
    assert run_ranks(1, written_out_while_built) == [(1, 3)]
