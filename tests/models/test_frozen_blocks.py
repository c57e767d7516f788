"""Which parts of a branch ``frozen_blocks`` freezes, and what they cost."""

import pytest
import torch
from pydantic import ValidationError

from piip_scale.config.model import PiipConfig
from piip_scale.models.branch import BranchState
from piip_scale.models.piip import PIIP

VIT = {"resolution_px": 64, "embed_dim": 32, "depth": 4, "num_heads": 2, "class_token": True, "drop_path_rate": 0.9}
# Downsamplings count as blocks, as everywhere: block 2 is the first of the second stage.
CONVNEXT = {"kind": "convnext", "resolution_px": 64, "depths": (2, 1), "widths": (32, 64), "drop_path_rate": 0.9}


def network(numbers, **more) -> PIIP:
    torch.manual_seed(0)
    return PIIP(PiipConfig(branches=({**numbers, **more},), pyramid={"scales": (1.0,)}))


@pytest.mark.parametrize("numbers", [VIT, CONVNEXT])
@pytest.mark.parametrize("frozen_blocks", [0, 1, 3, "all"])
def test_the_first_blocks_and_what_lies_below_them_are_frozen(numbers, frozen_blocks):
    branch = network(numbers, frozen_blocks=frozen_blocks).branches[0]
    count = len(branch.blocks) if frozen_blocks == "all" else frozen_blocks
    frozen = [branch.embedding, *branch.blocks[:count]] if count else []
    frozen += [branch.class_token] if count and hasattr(branch, "class_token") else []
    expected = {id(parameter) for module in frozen for parameter in module.parameters()}
    assert {id(parameter) for parameter in branch.parameters() if not parameter.requires_grad} == expected


@pytest.mark.parametrize("numbers", [VIT, CONVNEXT])
@pytest.mark.parametrize("checkpoint_blocks", [False, True])
def test_frozen_blocks_run_without_gradient_work_and_without_chance(numbers, checkpoint_blocks):
    branch = network(numbers, frozen_blocks=3, checkpoint_blocks=checkpoint_blocks).branches[0].train()
    saved = []

    def tokens(last: int) -> BranchState:
        return branch.run(branch.embed(torch.ones(4, 3, 64, 64)), 0, last)

    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        grid_BHWC = tokens(3).grid_BHWC
    assert not saved
    assert not grid_BHWC.requires_grad
    assert torch.equal(grid_BHWC, tokens(3).grid_BHWC)
    assert tokens(4).grid_BHWC.requires_grad


def test_more_than_there_are_cannot_be_frozen():
    with pytest.raises(ValidationError, match=r"branches.0.frozen_blocks=5 must be at most depth=4, or 'all'"):
        network(VIT, frozen_blocks=5)
