"""``interaction.direction="to_small"``: the other direction is absent, and a frozen giant costs no graph."""

import pytest
import torch

from piip_scale.config.model import PiipConfig
from piip_scale.models.branch import BranchState
from piip_scale.models.piip import PIIP
from piip_scale.ops.resize import resize_image

GIANT = {"resolution_px": 32, "embed_dim": 64, "depth": 4, "num_heads": 4, "class_token": True, "frozen_blocks": "all"}
MIDDLE = {"resolution_px": 48, "embed_dim": 32, "depth": 2, "num_heads": 2}
SMALL = {"kind": "convnext", "resolution_px": 64, "depths": (1, 1), "widths": (32, 32), "blocks_per_stage": (2, 1)}
UNIT = {"num_stages": 2, "num_heads": 2, "direction": "to_small", "gamma_init": 0.5}
IMAGE = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))


def network(**more) -> PIIP:
    torch.manual_seed(0)
    config = PiipConfig(branches=(GIANT, MIDDLE, SMALL), interaction=UNIT | more, attention_kernel="math")
    return PIIP(config).train()


def by_hand(model: PIIP) -> tuple[torch.Tensor, ...]:
    """Branches, and each smaller one's injection from its larger neighbour as that was before the units."""
    sizes, (giant, middle, small) = (32, 48, 64), model.branches
    states = [
        branch.embed(resize_image(IMAGE, size / sizes[-1])) for branch, size in zip(model.branches, sizes, strict=True)
    ]
    for stage in range(2):
        runs = zip((giant, middle, small), states, ((0, 2, 4), (0, 1, 2), (0, 2, 3)), strict=True)
        states = [branch.run(state, ends[stage], ends[stage + 1]) for branch, state, ends in runs]
        grids = [state.grid_BHWC for state in states]
        found = [grids[0]]
        for pair in range(2):
            unit = model.interactions[stage][pair]
            seen = unit.project_to_small(grids[pair])
            found.append(unit.inject_into_small(grids[pair + 1], seen, None))
        states = [BranchState(grid, state.class_token_B1C) for grid, state in zip(found, states, strict=True)]
    merged = model.mergings[0](*(state.grid_BHWC for state in states))
    return model.pyramid(*[merged] * len(model.config.pyramid.scales))


def gradients(model: PIIP, features) -> dict[str, torch.Tensor]:
    sum((feature * feature).mean() for feature in features).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("more", [{}, {"attention": "cross", "checkpoint_units": True}, {"projection": False}])
def test_it_is_the_network_without_the_other_directions_units(more):
    model, reference = network(**more), network(**more)
    # Autograd through everything, the giant too, is what the trained parts' gradients are held against.
    reference.requires_grad_(True)
    features, expected = model(IMAGE), by_hand(reference)
    for found, wanted in zip(features, expected, strict=True):
        assert torch.equal(found, wanted)
    found, wanted = gradients(model, features), gradients(reference, expected)
    assert set(found) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in wanted if name not in found} == set(
        dict(model.branches[0].named_parameters(prefix="branches.0"))
    )
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-5, atol=1e-7, msg=name)


def test_the_other_directions_parts_are_absent():
    both, one = network(direction="both"), network()
    absent = {name for name, _ in both.named_parameters()} - {name for name, _ in one.named_parameters()}
    assert absent
    assert all(".project_to_large." in name or ".inject_into_large." in name for name in absent)


def test_a_frozen_giant_keeps_nothing_for_the_backward_pass():
    model, saved, inside, outputs = network(), [], [], []

    def leave(_block, _inputs, output):
        inside.pop()
        outputs.append(output)

    for block in model.branches[0].blocks:
        block.register_forward_pre_hook(lambda *_: inside.append(True))
        block.register_forward_hook(leave)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(bool(inside)) or t, lambda t: t):
        model(IMAGE)
    assert [output.requires_grad for output in outputs] == [False] * 4
    assert set(saved) == {False}
