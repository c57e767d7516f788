"""A model's first weights: the same whatever the ranks, read or drawn, and no more of them than a rank keeps."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from pyramid_task import PyramidModel, PyramidTask, network, pyramid_config
from ranks import FORCED_RELEASE, run_ranks
from safetensors.torch import save_file
from test_equality import weights_of
from torch import nn

from piip_scale.engine.zero.building import draw, fill, load_whole
from piip_scale.engine.zero.plan import measure, plan_sharding
from piip_scale.engine.zero.setup import build_engine, build_model, give_weights
from piip_scale.errors import ModelError
from piip_scale.models.official_keys import official_branch_name
from piip_scale.models.piip import PIIP

CPU = torch.device("cpu")


def built(world, device, *configs):
    """The weights of each config's engine before its first step, and how many parameters are sharded."""
    found = []
    for config in configs:
        engine, _ = build_engine(build_model(PyramidTask(config, world), 0), config, world)
        sharded = [n for n, p in engine.module.named_parameters() if not getattr(p, "ds_persist", True)]
        assert engine.module.head.offset.dtype == torch.float32
        assert {p.dtype for p in engine.module.parameters()} == {next(engine.module.parameters()).dtype}
        found.append((weights_of(engine), sharded))
    return found


def plain(config, seed: int = 0) -> dict[str, np.ndarray]:
    """The reference: no ranks, no DeepSpeed."""
    torch.manual_seed(seed)
    model = build_model(PyramidTask(config, None), seed)
    sizes = measure(model, model.parts())
    give_weights(model, config, sizes, plan_sharding(pyramid_config(zero={"stage": 1}), sizes, 1), CPU)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.train.precision]
    return {name: parameter.detach().to(dtype).float().numpy() for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """Weights of the large branch as released: on another grid of positions, without scales; and of the network."""
    folder = tmp_path_factory.mktemp("weights")
    config = pyramid_config().model
    torch.manual_seed(5)
    with torch.no_grad():
        state = PIIP(config).state_dict()
    large = {n.removeprefix("branches.0."): v for n, v in state.items() if n.startswith("branches.0.")}
    large = {official_branch_name(n, config.branches[0], "deit"): torch.randn_like(v) for n, v in large.items()}
    large |= {"pos_embed": torch.randn(1, 10, 64), "cls_token": torch.zeros(1, 1, 64)}
    large = {name: value for name, value in large.items() if ".gamma_1" not in name}
    save_file({name: value.bfloat16() for name, value in large.items()}, folder / "large.safetensors")
    torch.save({"model": large}, folder / "large.pth")
    torch.save({"model": large}, folder / "old.pth", _use_new_zipfile_serialization=False)
    save_file({name: torch.randn_like(value) for name, value in state.items()}, folder / "network.safetensors")
    return {path.name: path for path in folder.iterdir()}


def config_of(files, name: str | None, precision: str, **zero):
    named = {"pretrained": str(files[name])} if name else {}
    model = network(**named) if name == "network.safetensors" else network(large=named)
    zero = {"stage": 3, "deepspeed": FORCED_RELEASE} | zero
    return pyramid_config(model, zero=zero, train={"precision": precision})


SOURCES = (None, "large.safetensors", "large.pth", "old.pth", "network.safetensors")


@pytest.mark.parametrize(
    ("num_ranks", "precision", "sources"), [(1, "fp32", SOURCES), (2, "bf16", SOURCES[:2]), (3, "fp32", SOURCES[:3])]
)
def test_ranks_together_hold_what_one_process_would(files, num_ranks, precision, sources):
    configs = [config_of(files, source, precision) for source in sources]
    configs += [config_of(files, "large.safetensors", precision, stage=1, deepspeed={})] * (num_ranks == 1)
    for config, results in zip(configs, zip(*run_ranks(num_ranks, built, *configs), strict=True), strict=True):
        assert_plain(config, results)


@pytest.mark.slow  # four processes
def test_a_second_copy_on_the_node_is_written_too(files):
    config = config_of(files, "large.safetensors", "bf16", node_partition=2)
    for results in zip(*run_ranks(4, built, config), strict=True):
        assert_plain(config, results)


def assert_plain(config, results) -> None:
    expected = plain(config)
    for weights, sharded in results:
        assert len(sharded) >= 16 if config.zero.stage == 3 else not sharded
        assert weights.keys() == expected.keys()
        for name, weight in expected.items():
            np.testing.assert_array_equal(weights[name], weight, err_msg=name)


def test_a_module_draws_the_same_whatever_is_around_it(files):
    one, other = pyramid_config(), pyramid_config(network(small={"depth": 4}, interaction={"num_stages": 1}))
    first, second = plain(one), plain(other)
    shared = [name for name in first if name.startswith("backbone.branches.0.")]
    assert all(np.array_equal(first[name], second[name]) for name in shared)
    blocks = [first[f"backbone.branches.0.blocks.{index}.mlp.fc1.weight"] for index in range(4)]
    assert not any(np.array_equal(blocks[0], block) for block in blocks[1:])
    other_seed = plain(pyramid_config(train={"seed": 1}))
    assert not np.array_equal(first[shared[0]], other_seed[shared[0]])


def test_drawn_weights_are_those_of_a_network_built_as_usual():
    """Same distributions; a parameter that nobody draws would show."""
    config = pyramid_config(network(large={"qkv_bias": False}, small={"norm": "rmsnorm"})).model
    torch.manual_seed(0)
    usual = dict(PIIP(config).named_parameters())
    with torch.device("meta"):
        model = PIIP(config)
    fill(model, {}, 0, load_whole(CPU))
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        assert parameter.requires_grad
        spread, expected = (tensor.std(correction=0).item() for tensor in (parameter, usual[name]))
        assert spread == pytest.approx(expected, rel=0.1 if parameter.numel() > 1000 else 0.5, abs=1e-3), name
        assert parameter.mean().item() == pytest.approx(usual[name].mean().item(), abs=0.1), name


def test_a_module_that_cannot_draw_is_named():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(2))

    with pytest.raises(ModelError, match="Odd has parameters and cannot draw them"):
        draw(Odd(), 0)


def test_drawing_leaves_the_random_numbers_of_others_alone():
    module, before = nn.Linear(3, 4), torch.get_rng_state()
    draw(module, 0)
    assert torch.equal(torch.get_rng_state(), before)


WIDE = {"embed_dim": 1024, "depth": 8, "num_heads": 16, "patch_size_px": 4}


class Watch:
    """The most anonymous memory of this process above what it had at first, in MiB, looked at every 2 ms."""

    def __enter__(self):
        self.first, self.most, self.over = self._now(), 0.0, False
        self.thread = threading.Thread(target=self._look, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.over = True
        self.thread.join()

    def _look(self):
        while not self.over:
            self.most = max(self.most, self._now() - self.first)
            time.sleep(0.002)

    @staticmethod
    def _now() -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))


def memory_to_load(world, device, config):
    model: nn.Module = PyramidModel(config.model)
    sizes = measure(model, model.parts())
    model.set_precision(torch.bfloat16)
    with Watch() as watch:
        give_weights(model, config, sizes, plan_sharding(config, sizes, world.num_ranks), device)
    return watch.most, sum(p.ds_numel if hasattr(p, "ds_id") else p.numel() for p in model.parameters())


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads Linux's account of memory")
def test_a_rank_reads_no_more_than_it_keeps(tmp_path):
    model = network(large=WIDE, interaction={"num_stages": 1, "num_heads": 2})
    config = pyramid_config(model).model
    with torch.device("meta"):
        branch = PIIP(config).branches[0].state_dict()
    names = {official_branch_name(name, config.branches[0], "deit"): value for name, value in branch.items()}
    weights = {name: torch.ones(value.shape, dtype=torch.bfloat16) for name, value in names.items()}
    save_file(weights, tmp_path / "wide.safetensors")
    model["branches"][0]["pretrained"] = str(tmp_path / "wide.safetensors")
    kept = pyramid_config(model, zero={"stage": 3}, train={"precision": "bf16"})
    for most, numel in run_ranks(2, memory_to_load, kept):
        assert numel > 100e6
        # A rank's half of the weights in bf16 is 1 byte an element, and one drawn kernel in float32 comes and goes.
        # All of them in bf16 would be 2 bytes an element; in float32, as a plain build starts, 4.
        assert most * 2**20 < 2 * numel
