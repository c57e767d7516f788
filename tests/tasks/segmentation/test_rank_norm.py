"""Batch norm over ranks is torch's over the joint batch: outputs, gradients and running statistics."""

from pathlib import Path

import preloaded
import pytest
import torch
import torch.distributed as dist
from torch import nn

from piip_scale.tasks.segmentation.rank_norm import RankBatchNorm

WORKER = Path(__file__).with_name("rank_norm_worker.py")


def test_ranks_normalise_as_one(tmp_path):
    torch.manual_seed(0)
    maps, plain = torch.randn(4, 3, 5, 2) * torch.tensor([1.0, 5.0, 0.1]).view(1, 3, 1, 1) + 2, nn.BatchNorm2d(3)
    nn.init.normal_(plain.weight)
    torch.save({"maps": maps, "state": plain.state_dict(), "per_step": 1}, tmp_path / "given.pt")
    ranks = [preloaded.Python([WORKER, tmp_path, rank, 2]) for rank in range(2)]
    assert [process.wait(timeout=240) for process in ranks] == [0, 0]
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for step in range(2):
        joint = maps[[step, 2 + step]].requires_grad_()
        out = plain.train()(joint)
        (out * out.detach().cos()).sum().backward()
        torch.testing.assert_close(torch.cat([one["found"][step][0] for one in found]), out.detach())
        torch.testing.assert_close(torch.cat([one["found"][step][1] for one in found]), joint.grad)
    torch.testing.assert_close(found[0]["weight"] + found[1]["weight"], plain.weight.grad)
    for name, value in plain.state_dict().items():
        for one in found:
            torch.testing.assert_close(one["state"][name], value, msg=name)


@pytest.fixture
def only_rank():
    """A group of one, as a training by one process joins it."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("only_rank")
def test_the_only_rank_normalises_on_a_cpu():
    test_alone_it_is_torchs_and_keeps_its_statistics_in_float32()


def test_alone_it_is_torchs_and_keeps_its_statistics_in_float32():
    torch.manual_seed(0)
    maps, plain, ours = torch.randn(4, 3, 5, 2), nn.BatchNorm2d(3), RankBatchNorm(3)
    for module in (plain, ours):
        module.train()(maps)
    torch.testing.assert_close(ours.running_var, plain.running_var)
    torch.testing.assert_close(ours.eval()(maps), plain.eval()(maps))
    ours.bfloat16()
    assert (ours.weight.dtype, ours.running_mean.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(ours.running_mean, plain.running_mean, atol=0, rtol=0.01)
