import torch
from ranks import run_ranks

from piip_scale.engine.collective import mean_over_ranks, require_same
from piip_scale.errors import RunError


def agreements(world, _device):
    mine = [{"loss_a": 1.0, "loss_mask": 5.0}, {"loss_a": 3.0, "loss_dn": 7.0}][world.rank]
    means = mean_over_ranks({name: torch.tensor(value) for name, value in mine.items()}, torch.device("cpu"))
    require_same("the shards", "one set", "copy it")
    try:
        require_same("the shards", f"set {world.rank}", "copy it")
    except RunError as error:
        return means, error.line


def test_ranks_agree_on_means_and_on_what_differs():
    # A loss that some ranks lack is the mean of the others.
    means = {"loss_a": 2.0, "loss_dn": 7.0, "loss_mask": 5.0}
    line = "the shards of rank 1 differ from those of rank 0: got 'set 1'; rank 0 has 'set 0'; copy it"
    assert run_ranks(2, agreements) == [(means, line)] * 2
