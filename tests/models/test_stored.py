"""Frozen weights in 8 bits: which layers have them, and what files of float weights become."""

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file

from piip_scale.config.model import PiipConfig
from piip_scale.models.piip import PIIP
from piip_scale.models.stored import StoredWeights
from piip_scale.ops.stored_linear import store
from piip_scale.tasks.weights import SafetensorsWeights, StoredInModel, load_weights

VIT = {"resolution_px": 64, "embed_dim": 64, "depth": 3, "num_heads": 2, "layer_scale_init": 1.0}
IMAGE = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def network(**more) -> PIIP:
    torch.manual_seed(0)
    return PIIP(PiipConfig(branches=(VIT | more,), pyramid={"scales": (1.0,)}, attention_kernel="math")).eval()


@pytest.mark.parametrize(("kind", "bound"), [("int8", 0.01), ("fp8", 0.04)])
def test_features_lose_little(kind, bound):
    plain, stored = network(frozen_blocks="all"), network(frozen_blocks="all", frozen_dtype=kind)
    weights = StoredWeights(stored, plain.state_dict())
    assert set(weights) == set(stored.state_dict())
    stored.load_state_dict(dict(weights))
    wanted, found = plain(IMAGE)[0], stored(IMAGE)[0]
    assert 0 < (found - wanted).norm() / wanted.norm() < bound


def test_only_linear_layers_of_frozen_blocks_are_stored():
    model = network(frozen_blocks=2, frozen_dtype="int8")
    names = {name for name, p in model.named_parameters() if p.dtype == torch.int8}
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert names == {f"branches.0.blocks.{block}.{layer}.weight" for block in (0, 1) for layer in layers}
    added = network(lora={"targets": ("mlp",)}, frozen_blocks=1, frozen_dtype="fp8")
    assert sum(p.dtype == torch.uint8 for p in added.parameters()) == 12
    assert all(p.requires_grad == (".lora." in n) for n, p in added.branches[0].named_parameters())
    added.train()(IMAGE)[0].square().mean().backward()
    assert all(p.grad is not None for p in added.branches[0].parameters() if p.requires_grad)


def test_weights_that_are_stored_already_stay_as_they_are():
    model = network(frozen_blocks="all", frozen_dtype="int8")
    state = model.state_dict()
    assert all(torch.equal(StoredWeights(model, state)[name], tensor) for name, tensor in state.items())
    name = "branches.0.blocks.0.attn.qkv.weight"
    weight = torch.randn(192, 64)
    made = StoredWeights(model, {name: weight})
    numbers, scale = store(weight, "int8")
    assert torch.equal(made[name], numbers)
    assert torch.equal(made[f"{name}_scale"], scale)


@pytest.fixture
def restless_threads():
    """The interpreter goes from thread to thread as often as it can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("restless_threads")
def test_threads_get_the_weights_they_ask_for():
    model = network(frozen_blocks="all", frozen_dtype="int8")
    weights = {name: torch.randn(tensor.shape) for name, tensor in network().state_dict().items()}
    given = StoredWeights(model, weights)
    alone = {name: StoredWeights(model, weights)[name] for name in given}
    with ThreadPoolExecutor(4) as threads:
        for name, found in [(name, threads.submit(given.__getitem__, name)) for name in list(given) * 20]:
            assert torch.equal(found.result(), alone[name]), name


def test_drawn_weights_are_stored_from_the_same_draw():
    plain, stored = network(), network(frozen_blocks="all", frozen_dtype="int8")
    for model in (plain, stored):
        torch.manual_seed(5)
        model.branches[0].blocks[0].attn.qkv.reset_parameters()
    layer = stored.branches[0].blocks[0].attn.qkv
    assert torch.equal(layer.weight, store(plain.branches[0].blocks[0].attn.qkv.weight, "int8")[0])


def test_what_is_trained_cannot_be_stored():
    with pytest.raises(ValidationError, match="frozen_dtype='int8' is of frozen blocks, and there are none"):
        network(frozen_dtype="int8")


def test_a_trained_models_floats_are_stored_as_its_config_says(tmp_path):
    plain, stored = network(frozen_blocks="all"), network(frozen_blocks="all", frozen_dtype="int8")
    save_file(plain.state_dict(), tmp_path / "floats.safetensors")
    expected = dict(StoredWeights(stored, plain.state_dict()))
    load_weights(stored, StoredInModel(stored, SafetensorsWeights(tmp_path / "floats.safetensors")))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in stored.state_dict().items())
    save_file(stored.state_dict(), tmp_path / "stored.safetensors")
    again = network(frozen_blocks="all", frozen_dtype="int8")
    load_weights(again, StoredInModel(again, SafetensorsWeights(tmp_path / "stored.safetensors")))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())
