"""A trained model by what a user names: a run, one of its steps, or a config and weights."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from piip_scale.checkpoint.store import CheckpointStore
from piip_scale.errors import CheckpointError, ConfigError, ModelError
from piip_scale.tasks.trained import find_trained


def test_a_run_alone_loads_what_its_newest_checkpoint_converts_to(trained, weights):
    found = find_trained(trained)
    assert found.step == 6
    model, expected = found.load(), find_trained(trained / "config.py", weights).load()
    assert not model.training
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_a_step_and_a_checkpoint_by_its_path_are_the_same(trained, weights):
    earlier = find_trained(trained, step=4)
    by_path = find_trained(trained / "config.py", CheckpointStore(trained / "checkpoints", keep=1).path(4))
    assert (earlier.step, by_path.step) == (4, 4)
    assert earlier.weights.name == by_path.weights.name
    name = "heads.detector.rpn_head.rpn_cls.weight"
    assert torch.equal(earlier.weights.read(name, torch.float32), by_path.weights.read(name, torch.float32))
    assert not torch.equal(earlier.weights.read(name, torch.float32), load_file(weights)[name])


def test_in_bf16_the_network_is_rounded_and_the_heads_are_not(trained, weights):
    model = find_trained(trained, weights).load("bf16")
    for name, stored in load_file(weights).items():
        loaded = model.state_dict()[name]
        dtype = torch.bfloat16 if name.startswith("backbone.") else stored.dtype
        assert loaded.dtype == dtype, name
        assert torch.equal(loaded, stored.to(dtype)), name


def test_other_choices_of_what_is_there_are_one_line(trained, weights, tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 5 in .*there are those of 4, 6"):
        find_trained(trained, step=5)
    with pytest.raises(CheckpointError, match="no files of averaged weights"):
        find_trained(trained, averaged=True)
    for chosen in ({"step": 4}, {"averaged": True}):
        with pytest.raises(ModelError, match="are of one step and kind"):
            find_trained(trained, weights, **chosen)
    with pytest.raises(ConfigError, match="comes without weights"):
        find_trained(trained / "config.py")
    with pytest.raises(ConfigError, match="is no run's directory"):
        find_trained(tmp_path)
    with pytest.raises(ModelError, match="weights not found"):
        find_trained(trained, tmp_path)
    (tmp_path / "config.py").write_text((trained / "config.py").read_text())
    with pytest.raises(CheckpointError, match="no whole checkpoint in"):
        find_trained(tmp_path)
    save_file(load_file(weights) | {"stranger": torch.zeros(1)}, tmp_path / "more.safetensors")
    with pytest.raises(ModelError, match=r"1 unexpected \(stranger\)"):
        find_trained(trained, tmp_path / "more.safetensors").load()
