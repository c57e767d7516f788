"""Rotary positions, registers and windows: what is defined here and in no other library, by its laws."""

import copy

import pytest
import torch
from torch.nn import functional

from piip_scale.config.branches import VitBranchConfig
from piip_scale.config.model import AUTO_KERNELS, PiipConfig
from piip_scale.models.piip import PIIP
from piip_scale.models.vit import Attention, Vit
from piip_scale.ops.rotary import rotary_table, rotate, rotate_plain

NUMBERS = {"resolution_px": 96, "embed_dim": 32, "depth": 2, "num_heads": 2, "position_embedding": False}
TOKENS = {"class_token": True, "register_tokens": 2}


def branch_of(seed=0, **changes):
    torch.manual_seed(seed)
    return Vit(VitBranchConfig(**NUMBERS | {"rotary": {}} | changes)).eval()


@pytest.mark.parametrize("halves", [True, False])
def test_scores_depend_on_distances_and_lengths_stay(halves):
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 1, 1, 16, generator=generator, dtype=torch.float64)
    place = torch.tensor([0.3, 1.1, 2.4], dtype=torch.float64)

    def score(shift):
        first, second = rotary_table(place[:2] + shift, place[1:] - shift, 16, 100.0).unbind(1)
        turned = [rotate(x, t[:, None, None], halves) for x, t in ((query, first), (key, second))]
        torch.testing.assert_close(turned[0].norm(), query.norm())
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score(0.0), score(5.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("halves", [True, False])
def test_turning_in_place_is_the_formula(dtype, halves):
    generator = torch.Generator().manual_seed(2)
    wide = torch.promote_types(dtype, torch.float32)
    table = torch.randn(2, 3, 5, 4, generator=generator, dtype=wide)
    # As queries lie in a projection: heads behind tokens, in every third of its channels.
    projected = torch.randn(6, 5, 48, generator=generator).to(dtype).requires_grad_()
    heads = projected.chunk(3, -1)[1].unflatten(-1, (2, 8)).transpose(1, 2)
    expected = rotate_plain(heads.unflatten(0, (2, 3)), table.unsqueeze(2), halves).flatten(0, 1)
    found = rotate(heads, table, halves)
    assert found.dtype == dtype
    assert found.transpose(1, 2).is_contiguous()
    cotangent = torch.randn(found.shape, generator=generator).to(dtype)
    gradients = [torch.autograd.grad(turned, projected, cotangent)[0] for turned in (found, expected)]
    tolerance = torch.finfo(dtype).eps * 4
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(*gradients, atol=tolerance, rtol=tolerance)


def test_an_exported_program_has_the_formula():
    """Complex numbers and results written in place are for torch alone; what others run has neither."""

    class Turning(torch.nn.Module):
        def forward(self, heads, table):
            return rotate(heads, table, halves=False) + rotate(heads, table, halves=True)

    tensors = torch.randn(2, 1, 3, 8), torch.randn(2, 2, 3, 4)
    program = torch.export.export(Turning(), tensors)
    operators = " ".join(str(node.target) for node in program.graph.nodes)
    assert "aten.mul" in operators
    assert "complex" not in operators
    assert "addcmul" not in operators
    torch.testing.assert_close(program.module()(*tensors), Turning()(*tensors))


def test_turning_keeps_the_table_alone():
    heads, kept = torch.randn(1, 2, 6, 8, requires_grad=True), []
    table = torch.randn(2, 1, 6, 4)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        rotate(heads, table, halves=True)
    assert {tensor.untyped_storage().data_ptr() for tensor in kept} == {table.untyped_storage().data_ptr()}


@pytest.mark.parametrize("grid", [(6, 6), (6, 9)])
def test_windows_are_full_attention_that_sees_less(grid):
    """Where no window is padded: the slow twin is attention over everything with scores of minus infinity."""
    config = branch_of(window_size_tokens=(3, 3), **TOKENS).config
    branch, (height, width), prefix = Vit(config), grid, config.prefix_tokens
    attention = Attention(config, 0, AUTO_KERNELS)
    tokens = torch.randn(2, prefix + height * width, 32, generator=torch.Generator().manual_seed(1))
    tables = {window: copy.deepcopy(branch).rotary.requires_grad_(False) for window in (0, 3)}
    tables[0].windows = [0]
    grid_tokens = tokens[:, prefix:].unflatten(1, grid)
    found = attention(tokens, height, width, tables[3](grid_tokens)[3])

    rows, columns = torch.arange(height * width) // width // 3, torch.arange(height * width) % width // 3
    sees = torch.ones(2 * (prefix + height * width,), dtype=torch.bool)
    sees[prefix:, prefix:] = (rows[:, None] == rows) & (columns[:, None] == columns)
    query, key, value = attention._heads(tokens, tables[0](grid_tokens)[0])
    expected = functional.scaled_dot_product_attention(query, key, value, attn_mask=sees)
    torch.testing.assert_close(found, attention.proj(expected.transpose(1, 2).flatten(2)), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("windows", [(), (3, 0)])
def test_a_checkpointed_block_and_one_that_skips_samples_are_plain_ones(windows):
    plain = branch_of(window_size_tokens=windows, feed_forward="swiglu", **TOKENS).train()
    other = branch_of(
        window_size_tokens=windows, feed_forward="swiglu", checkpoint_blocks=True, drop_path_mode="skip", **TOKENS
    ).train()
    image = torch.randn(3, 3, 80, 112)
    gradients = []
    for branch in (plain, other):
        state = branch.run(branch.embed(image), 0, 2)
        (state.grid_BHWC.square().mean() + state.registers_BRC.mean()).backward()
        gradients.append({name: value.grad for name, value in branch.named_parameters()})
    for name, value in gradients[0].items():
        torch.testing.assert_close(value, gradients[1][name], msg=name)
    skipping = branch_of(window_size_tokens=windows, drop_path_rate=0.5, drop_path_mode="skip", **TOKENS).train()
    assert skipping.run(skipping.embed(image), 0, 2).grid_BHWC.isfinite().all()


def test_coordinates_are_rescaled_in_training_alone_and_never_of_a_frozen_branch():
    branch = branch_of(rotary={"rescale": 2.0})
    image = torch.randn(1, 3, 64, 64)
    fixed = branch.embed(image).rotary[0]
    assert torch.equal(fixed, branch.embed(image).rotary[0])
    torch.manual_seed(3)
    drawn = branch.train().embed(image).rotary[0]
    assert not torch.equal(fixed, drawn)
    torch.manual_seed(3)
    assert torch.equal(drawn, branch.embed(image).rotary[0])
    numbers = NUMBERS | {"rotary": {"rescale": 2.0}, "frozen_blocks": 1}
    frozen = PIIP(PiipConfig(branches=(numbers,), pyramid={"scales": (1.0,)})).train().branches[0]
    assert torch.equal(frozen.embed(image).rotary[0], fixed)


def test_tokens_before_the_cells_are_not_turned():
    table = branch_of(**TOKENS).embed(torch.zeros(1, 3, 48, 64)).rotary[0]
    heads = torch.randn(1, 2, 3 + 3 * 4, 16)
    turned = rotate(heads, table, halves=True)
    assert torch.equal(turned[:, :, :3], heads[:, :, :3])
    assert not torch.isclose(turned[:, :, 3:], heads[:, :, 3:]).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 16}, "must be a multiple of 4"),
        ({"rotary": {"offset_cells": 1.0}}, "coordinates to cells"),
        ({"mlp_norm": True}, "feed_forward"),
        ({"relative_position_bias": True, "window_size_tokens": (3, 3), "class_token": True}, "knows cells only"),
    ],
)
def test_numbers_that_do_not_agree_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        branch_of(**changes)
