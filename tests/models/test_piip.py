import sys
import types

import pytest
import torch
from torch import nn

from piip_scale.config.model import PiipConfig
from piip_scale.errors import KernelError, ModelError
from piip_scale.models.layers import LayerScale, build_norm
from piip_scale.models.piip import PIIP
from piip_scale.ops.deform_attention import deform_attention_reference


def branch(resolution: int, dim: int, depth: int = 4, **changes: object) -> dict[str, object]:
    numbers = {"resolution_px": resolution, "embed_dim": dim, "depth": depth, "num_heads": 4}
    return numbers | {"pretrain_resolution_px": 64, "layer_scale_init": 0.5} | changes


BRANCHES = [
    branch(64, 64, norm="rmsnorm", qkv_bias=False, qk_norm=True, position_class_slot=True),
    branch(96, 48, 2, window_size_tokens=(3, 0), drop_path_rate=0.2, drop_path_schedule="linear"),
    branch(128, 32, 2, activation="gelu_tanh", layer_scale_init=None),
    branch(160, 16, 2, patch_size_px=8),
]

BEIT = {"key_bias": False, "position_embedding": False, "relative_position_bias": True, "window_size_tokens": (3,) * 4}
PERCEIVER = {"norm_eps": 1e-5, "embedding_norm": True, "frame_positions": 8}
CONVNEXT = {"kind": "convnext", "depths": (1, 1, 2, 1), "widths": (16, 32, 32, 64), "layer_scale_init": 0.5}
CONVNEXT |= {"blocks_per_stage": (3, 5), "resolution_px": 160}
MIXED = [branch(64, 64, **BEIT), branch(128, 32, 2, class_token=True, **PERCEIVER), CONVNEXT]
REGULAR = {"kind": "regular", "scales": (1.0, 1.0), "stages": (0, 1)}
MIXES = [
    {"branches": tuple(MIXED), "pyramid": REGULAR},
    {"branches": (CONVNEXT | {"resolution_px": 64}, *MIXED[1:2]), "pyramid": REGULAR | {"scales": (4.0, 0.5)}},
    {"branches": (CONVNEXT,), "pyramid": REGULAR},
]
"""Mixed kinds: a ConvNeXt at the highest and at the lowest resolution, and alone."""


def mix(index: int, **unit: object) -> PiipConfig:
    unit = {"num_stages": 2, "num_heads": 4, "gamma_init": 0.3} | unit
    return PiipConfig(interaction=unit, **MIXES[index])


def config(num_branches: int = 2, unit: dict[str, object] | None = None, **changes: object) -> PiipConfig:
    unit = {"num_stages": 2, "num_heads": 4, "gamma_init": 0.3} | (unit or {})
    return PiipConfig(branches=tuple(BRANCHES[:num_branches]), interaction=unit, **changes)


def build(settings: PiipConfig, seed: int = 0) -> PIIP:
    torch.manual_seed(seed)
    return PIIP(settings)


def image(height: int = 128, width: int = 160, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(3))


UNITS = [
    {},
    {"projection": False, "norm": "none"},
    {"attention": "cross"},
    {"attention": "cross", "projection": False, "ffn_ratio": 0.0},
]


NETWORKS = [config(num_branches) for num_branches in (1, 2, 3, 4)] + [mix(index) for index in range(len(MIXES))]


@pytest.mark.parametrize("settings", [config(n, u) for n in (2, 3) for u in UNITS[1:]] + NETWORKS)
def test_every_parameter_gets_a_gradient(settings):
    # In eval mode: drop path may drop a block for the whole batch.
    model = build(settings).eval()
    # A fresh deformable attention looks at fixed places with equal weights: its queries' layers start at zero.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.02)
    sum((feature * torch.randn_like(feature)).sum() for feature in model(image())).backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


@pytest.mark.parametrize("settings", NETWORKS[1:-1])
def test_with_all_gammas_at_zero_each_branch_equals_itself_alone(settings):
    unit = settings.interaction.model_copy(update={"gamma_init": 0.0})
    model = build(settings.model_copy(update={"interaction": unit})).eval()
    seen: list[torch.Tensor] = []
    model.mergings[-1].register_forward_pre_hook(lambda module, grids: seen.extend(grids))
    model(image())
    sizes = [b.resolution_px for b in settings.branches]
    for index, own in enumerate(settings.branches):
        own = own.model_copy(update={"blocks_per_stage": ()})
        alone = PIIP(PiipConfig(branches=(own,), pyramid={"scales": (1.0,)})).eval()
        alone.branches[0].load_state_dict(model.branches[index].state_dict())
        small = nn.functional.interpolate(image(), scale_factor=sizes[index] / sizes[-1], mode="bilinear")
        feature = alone(image() if sizes[index] == sizes[-1] else small)[0]
        assert torch.equal(feature, seen[index].permute(0, 3, 1, 2))


def test_gammas_that_are_not_zero_do_join_the_branches():
    joined, apart = build(config()), build(config(unit={"gamma_init": 0.0}))
    apart.load_state_dict({n: v for n, v in joined.state_dict().items()})
    for scale in apart.interactions.modules():
        if isinstance(scale, LayerScale):
            nn.init.zeros_(scale.gamma)
    assert (joined(image())[0] - apart(image())[0]).abs().max() > 1e-3


def gradients(model: PIIP) -> dict[str, torch.Tensor]:
    torch.manual_seed(11)
    sum(feature.square().mean() for feature in model(image())).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("settings", [config(3, {"drop_path_rate": 0.3}), mix(0, drop_path_rate=0.3)])
def test_checkpointed_equals_plain(settings):
    plain = build(settings)
    saving = tuple(b.model_copy(update={"checkpoint_blocks": True}) for b in plain.config.branches)
    unit = plain.config.interaction.model_copy(update={"checkpoint_units": True})
    saver = build(plain.config.model_copy(update={"branches": saving, "interaction": unit}))
    saver.load_state_dict(plain.state_dict())
    torch.testing.assert_close(gradients(saver), gradients(plain), rtol=0, atol=0)


def test_checkpointing_keeps_fewer_activations():
    def kept(model: PIIP) -> int:
        total = 0

        def pack(tensor):
            nonlocal total
            total += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(image())
        return total

    plain = config(3)
    saving = tuple(b.model_copy(update={"checkpoint_blocks": True}) for b in plain.branches)
    unit = plain.interaction.model_copy(update={"checkpoint_units": True})
    saver = plain.model_copy(update={"branches": saving, "interaction": unit})
    assert kept(build(saver)) < 0.5 * kept(build(plain))


@pytest.mark.parametrize("scales", [(4.0, 2.0, 1.0, 0.5), (2.0, 1.0, 0.5), (1.0,)])
@pytest.mark.parametrize("num_branches", [1, 2, 4])
def test_declared_channels_and_strides_are_real(num_branches, scales):
    model = build(config(num_branches, pyramid={"scales": scales})).eval()
    height, width = 128, 192
    features = model(image(height, width))
    declared = [(2, s.channels, height // s.stride_px, width // s.stride_px) for s in model.feature_specs]
    assert [tuple(feature.shape) for feature in features] == declared
    assert all(feature.dtype == torch.float32 for feature in features)


@pytest.mark.parametrize("index", range(len(MIXES)))
def test_a_regular_pyramids_channels_and_strides_are_real(index):
    model = build(mix(index)).eval()
    height, width = 128, 192
    features = model(image(height, width))
    declared = [(2, s.channels, height // s.stride_px, width // s.stride_px) for s in model.feature_specs]
    assert [tuple(feature.shape) for feature in features] == declared
    assert [s.stride_px for s in model.feature_specs] == [[8, 32], [4, 32], [8, 32]][index]


@pytest.mark.parametrize("size", [(97, 131), (101, 255), (131, 93)])
@pytest.mark.parametrize("settings", [config(3), config(4), mix(0), mix(1)])
def test_odd_sizes(size, settings):
    model = build(settings).eval()
    features = model(image(*size))
    for feature, spec in zip(features, model.feature_specs, strict=True):
        assert feature.shape[1] == spec.channels
        # Every halving rounds down on its own.
        for side, cells in zip(size, feature.shape[-2:], strict=True):
            assert side / spec.stride_px - 4 < cells <= side / spec.stride_px
        assert torch.isfinite(feature).all()


@pytest.mark.parametrize(
    ("size", "line"),
    [((23, 48), "image too small for a branch: got '15x32 px"), ((24, 48), "feature pyramid: got '1x3 tokens'")],
)
def test_too_small_an_image_says_so(size, line):
    with pytest.raises(ModelError, match=line):
        build(config(2))(image(*size))


def test_on_the_meta_device_it_has_no_memory_and_no_buffers():
    with torch.device("meta"):
        model = PIIP(config(3))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not list(model.buffers())


def test_a_fresh_network_neither_dies_nor_explodes():
    model = build(config(3)).eval()
    for feature in model(image(128, 128)):
        assert 0.05 < feature.std().item() < 20


@pytest.mark.parametrize("settings", [config(4), config(2, {"attention": "cross"}), mix(0), mix(1)])
def test_parameters_are_touched_only_inside_their_own_modules_forward(settings):
    """What ZeRO-3 asks for: outside its owner's forward a parameter is an empty tensor."""
    model = build(settings).eval()
    truth = model(image())
    whole = {parameter: parameter.data for parameter in model.parameters()}

    def gather(module, *_):
        for parameter in module.parameters(recurse=False):
            parameter.data = whole[parameter]

    def release(module, *_):
        for parameter in module.parameters(recurse=False):
            parameter.data = torch.empty(0)

    for module in model.modules():
        release(module)
        module.register_forward_pre_hook(gather)
        module.register_forward_hook(release)
    with torch.no_grad():
        features = model(image())
    torch.testing.assert_close(features, truth, rtol=0, atol=0)


@pytest.mark.parametrize("settings", [config(3), config(2, {"attention": "cross"}), mix(0), mix(1)])
def test_bfloat16_stays_near_float32_and_leaves_in_float32(settings):
    model = build(settings).eval()
    truth = model(image())
    model.set_precision(torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    features = model(image())
    for feature, expected in zip(features, truth, strict=True):
        assert feature.dtype == torch.float32
        assert (feature - expected).norm() < 0.05 * expected.norm()
    sum(feature.square().mean() for feature in features).backward()
    assert all(parameter.grad.dtype == torch.bfloat16 for parameter in model.parameters())


def test_parameter_rules_follow_the_released_layer_decay():
    model = build(config(2))
    rules = model.parameter_rules()
    assert set(rules) == {name for name, _ in model.named_parameters()}
    assert model.num_layers == 4
    layer_ids = {name: rule.layer_id for name, rule in rules.items()}
    assert layer_ids["branches.0.embedding.position"] == layer_ids["branches.1.embedding.proj.weight"] == 0
    assert [layer_ids[f"branches.0.blocks.{k}.attn.qkv.weight"] for k in range(4)] == [1, 2, 3, 4]
    assert [layer_ids[f"branches.1.blocks.{k}.mlp.fc1.bias"] for k in range(2)] == [2, 4]
    others = {rule.layer_id for name, rule in rules.items() if not name.startswith("branches.")}
    assert others == {5}
    assert not rules["branches.0.blocks.0.norm1.weight"].decays
    assert not rules["branches.1.blocks.0.attn.qkv.bias"].decays
    assert rules["branches.0.blocks.0.attn.qkv.weight"].decays
    assert rules["branches.0.embedding.position"].decays
    assert not build(config(1)).parameter_rules()["branches.0.embedding.position"].decays


def test_a_kernel_asked_for_by_name_is_there_or_nothing_is_built(monkeypatch):
    monkeypatch.setattr("piip_scale.ops.attention._find_flash", lambda: None)
    monkeypatch.setattr("piip_scale.ops.fused.has_triton", lambda: False)
    for name, kernel in (("attention_kernel", "flash"), ("deform_kernel", "triton")):
        with pytest.raises(KernelError, match=kernel):
            PIIP(config(2, **{name: kernel}))
    with pytest.raises(ValueError, match="flash cannot add the relative_position_bias"):
        PiipConfig(interaction={"num_stages": 2, "num_heads": 4}, attention_kernel="flash", **MIXES[0])


def test_sampling_locations_are_float32_in_bfloat16(monkeypatch):
    seen = []

    def watch(value, locations, weights):
        seen.append((value.dtype, locations.dtype, weights.dtype))
        return deform_attention_reference(value, locations, weights)

    monkeypatch.setattr("piip_scale.ops.deform_attention.deform_attention_reference", watch)
    model = build(config(2)).eval()
    model.set_precision(torch.bfloat16)
    model(image())
    assert set(seen) == {(torch.bfloat16, torch.float32, torch.float32)}


def test_apexs_norm_is_taken_where_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "apex.normalization", None)
    with pytest.raises(KernelError, match="needs NVIDIA's apex"):
        build_norm("apex_rmsnorm", 8)
    # A registry package of the same name has no such norm.
    monkeypatch.setitem(sys.modules, "apex", types.SimpleNamespace())
    monkeypatch.setitem(sys.modules, "apex.normalization", types.SimpleNamespace())
    with pytest.raises(KernelError, match="needs NVIDIA's apex"):
        build_norm("apex_rmsnorm", 8)
    monkeypatch.setitem(sys.modules, "apex.normalization", types.SimpleNamespace(FusedRMSNorm=nn.RMSNorm))
    fused, own = (build(config_with_norm(kind)) for kind in ("apex_rmsnorm", "rmsnorm"))
    assert set(fused.state_dict()) == set(own.state_dict())
    torch.testing.assert_close(fused(image()), own(image()))


def config_with_norm(kind: str) -> PiipConfig:
    return PiipConfig(branches=(branch(64, 64, norm=kind, qk_norm=True),))


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_norm_statistics_are_float32_in_bfloat16(kind):
    # The mean square of 4,096 numbers near 16 is far beyond what bfloat16 can add up.
    norm = build_norm(kind, 4096)
    x = (torch.randn(8, 4096, generator=torch.Generator().manual_seed(0)) + 16).bfloat16()
    truth = norm.double()(x.double())
    torch.testing.assert_close(norm.bfloat16()(x).double(), truth, rtol=2**-8, atol=2**-8)


def test_a_convnext_trains_at_the_heads_rate():
    model = build(mix(0))
    assert model.num_layers == 4
    rules = model.parameter_rules()
    assert {rule.layer_id for name, rule in rules.items() if name.startswith("branches.2.")} == {5}
    assert rules["branches.1.class_token.token"].layer_id == 0
    assert not rules["branches.2.blocks.0.ls.gamma"].decays


def test_drop_path_rates_follow_the_schedule():
    linear = BRANCHES[1] | {"drop_path_rate": 0.3}
    constant = linear | {"drop_path_schedule": "constant"}
    for kind, rates in ((linear, [0.0, 0.3]), (constant, [0.3, 0.3])):
        model = PIIP(PiipConfig(branches=(kind,), pyramid={"scales": (1.0,)}))
        assert [block.drop_path.rate for block in model.branches[0].blocks] == rates
