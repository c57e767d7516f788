"""Low-rank additions: nothing at the start, what autograd makes of the merged weights later."""

import re

import pytest
import torch
from pydantic import ValidationError

from piip_scale.config.model import PiipConfig
from piip_scale.models.piip import PIIP

VIT = {"resolution_px": 64, "embed_dim": 32, "depth": 3, "num_heads": 2, "class_token": True}
ALL = {"rank": 4, "alpha": 6.0, "targets": ("qkv", "proj", "mlp")}
IMAGE = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def network(**more) -> PIIP:
    torch.manual_seed(0)
    return PIIP(PiipConfig(branches=(VIT | more,), pyramid={"scales": (1.0,)}, attention_kernel="math"))


def pair(**more) -> tuple[PIIP, PIIP]:
    """A network with additions, and the same without."""
    plain, added = network(**more), network(lora=ALL, **more)
    added.load_state_dict(plain.state_dict(), strict=False)
    return plain, added


def draw_up(model: PIIP) -> None:
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".lora.up"):
                parameter.normal_(std=0.1)


@pytest.mark.parametrize("more", [{}, {"activation": "gelu_tanh", "checkpoint_blocks": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_one_changes_no_bit(more, dtype):
    plain, added = (model.to(dtype)(IMAGE.to(dtype)) for model in pair(**more))
    assert torch.equal(plain[0], added[0])


def test_only_additions_above_the_frozen_blocks_are_trained():
    names = {n: p.requires_grad for n, p in network(lora=ALL, frozen_blocks=1).branches[0].named_parameters()}
    assert {n for n, trained in names.items() if trained} == {n for n in names if ".lora." in n}
    layers = {n.split(".lora.")[0] for n in names if ".lora." in n}
    assert layers == {f"blocks.{b}.{n}" for b in (1, 2) for n in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}


@pytest.mark.parametrize("more", [{}, {"checkpoint_blocks": True}, {"activation": "gelu_tanh"}])
def test_outputs_and_gradients_are_those_of_the_merged_weights(more):
    plain, added = pair(**more)
    draw_up(added)
    own = dict(added.named_parameters())
    for name, weight in plain.named_parameters():
        stem = name.removesuffix(".weight")
        if f"{stem}.lora.up" in own:
            with torch.no_grad():
                weight += 1.5 * own[f"{stem}.lora.up"] @ own[f"{stem}.lora.down"]
    found, wanted = added.train()(IMAGE)[0], plain.train()(IMAGE)[0]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    (found.square().mean() * 100).backward()
    (wanted.square().mean() * 100).backward()
    for name, parameter in own.items():
        if ".lora." in name:
            stem, _, factor = name.rpartition(".lora.")
            whole = plain.get_parameter(f"{stem}.weight").grad
            up, down = own[f"{stem}.lora.up"], own[f"{stem}.lora.down"]
            expected = 1.5 * (whole @ down.T if factor == "up" else up.T @ whole)
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-6, msg=name)


def test_they_decay_by_layers_like_their_blocks_and_learn_at_the_rate_of_what_is_fresh():
    rules = network(lora=ALL).parameter_rules()
    for name, rule in rules.items():
        if ".lora." in name:
            block = int(re.search(r"blocks\.(\d+)", name)[1])
            assert (rule.layer_id, rule.decays, rule.fresh) == (block + 1, True, True)


def test_there_must_be_blocks_to_add_to():
    with pytest.raises(ValidationError, match="lora trains the blocks above frozen_blocks='all', which are none"):
        network(lora=ALL, frozen_blocks="all")


def test_a_rank_is_no_more_than_a_full_one():
    with pytest.raises(ValidationError, match=r"lora.rank=33 must be at most embed_dim=32"):
        network(lora=ALL | {"rank": 33})
