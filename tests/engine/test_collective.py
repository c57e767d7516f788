import torch
from ranks import run_ranks

from piip_scale.engine.collective import mean_over_ranks


def means(world, _device):
    mine = [{"loss_a": 1.0, "loss_mask": 5.0}, {"loss_a": 3.0, "loss_dn": 7.0}][world.rank]
    return mean_over_ranks({name: torch.tensor(value) for name, value in mine.items()})


def test_a_loss_that_some_ranks_lack_is_the_mean_of_the_others():
    assert run_ranks(2, means) == [{"loss_a": 2.0, "loss_dn": 7.0, "loss_mask": 5.0}] * 2
