import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed, resize_rel_pos_bias_table
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from piip_scale.config.branches import ConvNextBranchConfig, VitBranchConfig
from piip_scale.config.model import PiipConfig
from piip_scale.errors import ModelError
from piip_scale.models.convnext import ConvNext
from piip_scale.models.official_keys import official_branch_name
from piip_scale.models.piip import PIIP
from piip_scale.models.position_tables import resize_position_table
from piip_scale.models.pretrained import branch_weights, check_pretrained, pretrained_weights, read_weights
from piip_scale.models.vit import Vit

NUMBERS = {"resolution_px": 64, "embed_dim": 24, "depth": 2, "num_heads": 2}
INTERNVIT = {"position_class_slot": True, "layer_scale_init": 1.0}


def random_like(module: nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(value.shape, generator=generator) for name, value in module.state_dict().items()}


def timm_weights(side: int, patch: int = 16, **options: object) -> dict[str, torch.Tensor]:
    size = {"img_size": side * patch, "patch_size": patch, "num_classes": 7}
    return random_like(VisionTransformer(embed_dim=24, depth=2, num_heads=2, **size, **options))


def load_branch(branch: nn.Module, config, path) -> None:
    branch.load_state_dict(branch_weights(branch, config, path), strict=False)


def save(weights: object, path):
    torch.save(weights, path)
    return path


@pytest.mark.parametrize(
    ("side", "options", "changes"),
    [
        (4, {}, {}),  # DeiT: a class token's slot that the branch has none of
        (3, {"no_embed_class": True, "init_values": 1.0}, {"layer_scale_init": 1.0}),  # DeiT III, on another grid
        (4, {}, INTERNVIT),  # MAE, without scales
        (7, {"init_values": 1.0, "patch_size": 14}, INTERNVIT),  # DINOv2: 14 px patches
    ],
)
def test_plain_transformers_load(tmp_path, side, options, changes):
    patch = options.pop("patch_size", 16) if "patch_size" in options else 16
    weights = timm_weights(side, patch, **options)
    if not changes.get("position_class_slot"):
        weights = {re.sub(r"ls(\d)\.gamma", r"gamma_\1", name): value for name, value in weights.items()}
    path = save({"model": weights}, tmp_path / "vit.pth")
    config = VitBranchConfig(pretrain_resolution_px=64, **NUMBERS, **changes)
    branch = Vit(config)
    load_branch(branch, config, path)

    position = weights["pos_embed"]
    prefix = position.shape[1] - side**2
    resampled = resample_abs_pos_embed(position, [4, 4], num_prefix_tokens=prefix, antialias=False)
    expected = resampled[:, prefix - branch.embedding.num_slots :]
    torch.testing.assert_close(branch.embedding.position, nn.Parameter(expected), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(branch.blocks[1].attn.qkv.weight.data, weights["blocks.1.attn.qkv.weight"])
    kernel = weights["patch_embed.proj.weight"]
    if patch != 16:
        kernel = nn.functional.interpolate(kernel, size=(16, 16), mode="bicubic", align_corners=False)
    torch.testing.assert_close(branch.embedding.proj.weight.data, kernel)
    scale = weights.get("blocks.0.gamma_1", weights.get("blocks.0.ls1.gamma"))
    if scale is not None and "layer_scale_init" in changes:
        torch.testing.assert_close(branch.blocks[0].ls1.gamma.data, scale)
    elif "layer_scale_init" in changes:
        assert torch.equal(branch.blocks[0].ls1.gamma.data, torch.ones(24))


def test_augregs_numpy_files_load(tmp_path):
    theirs = VisionTransformer(img_size=64, patch_size=16, embed_dim=24, depth=2, num_heads=2, num_classes=0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_()
    state = {name: value.numpy() for name, value in theirs.state_dict().items()}
    arrays = {
        "cls": state["cls_token"],
        "embedding/kernel": state["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        "Transformer/posembed_input/pos_embedding": state["pos_embed"],
        "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
    }
    for index in range(2):
        block, layer = f"blocks.{index}.", f"Transformer/encoderblock_{index}/"
        for norm, place in (("norm1", "LayerNorm_0"), ("norm2", "LayerNorm_2")):
            arrays |= {f"{layer}{place}/scale": state[f"{block}{norm}.weight"]}
            arrays |= {f"{layer}{place}/bias": state[f"{block}{norm}.bias"]}
        attention = f"{layer}MultiHeadDotProductAttention_1/"
        for part, name in enumerate(("query", "key", "value")):
            rows = slice(24 * part, 24 * (part + 1))
            arrays[f"{attention}{name}/kernel"] = state[f"{block}attn.qkv.weight"][rows].T.reshape(24, 2, 12)
            arrays[f"{attention}{name}/bias"] = state[f"{block}attn.qkv.bias"][rows].reshape(2, 12)
        arrays[f"{attention}out/kernel"] = state[f"{block}attn.proj.weight"].T.reshape(2, 12, 24)
        arrays[f"{attention}out/bias"] = state[f"{block}attn.proj.bias"]
        for part in (0, 1):
            arrays[f"{layer}MlpBlock_3/Dense_{part}/kernel"] = state[f"{block}mlp.fc{part + 1}.weight"].T
            arrays[f"{layer}MlpBlock_3/Dense_{part}/bias"] = state[f"{block}mlp.fc{part + 1}.bias"]
    np.savez(tmp_path / "augreg.npz", **arrays)
    config = VitBranchConfig(pretrain_resolution_px=64, **NUMBERS, **INTERNVIT)
    branch = Vit(config)
    load_branch(branch, config, tmp_path / "augreg.npz")
    for name in ("attn.qkv.weight", "attn.proj.bias", "mlp.fc2.weight", "norm2.bias"):
        assert np.array_equal(branch.blocks[1].get_parameter(name).detach().numpy(), state[f"blocks.1.{name}"])
    assert np.array_equal(branch.embedding.position.detach().numpy(), state["pos_embed"])
    for other in ({"depth": 1}, {"depth": 3}, {"embed_dim": 48}):
        config = VitBranchConfig(pretrain_resolution_px=64, **NUMBERS | INTERNVIT | other)
        with pytest.raises(ModelError, match="no AugReg file of this branch's width and depth"):
            branch_weights(Vit(config), config, tmp_path / "augreg.npz")


@pytest.mark.parametrize("content", ["nothing", "noise", "another's", "cut off"])
def test_a_numpy_file_that_is_no_augreg_is_one_line(tmp_path, content):
    path = tmp_path / "w.npz"
    np.savez(path, a=np.zeros(3))
    whole = path.read_bytes()
    path.write_bytes({"nothing": b"", "noise": b"PK\x03\x04junk", "another's": whole, "cut off": whole[:-30]}[content])
    config = VitBranchConfig(**NUMBERS)
    with pytest.raises(ModelError, match=r"no AugReg file of this branch.*w\.npz") as raised:
        branch_weights(Vit(config), config, path)
    assert "\n" not in raised.value.line


@pytest.mark.parametrize("shared", [False, True])
def test_beit_loads_with_its_tables_resized(tmp_path, shared):
    kind = {"key_bias": False, "position_embedding": False, "relative_position_bias": True, "layer_scale_init": 0.1}
    config = VitBranchConfig(window_size_tokens=(6, 6), **NUMBERS, **kind)
    branch = Vit(config)
    weights = {official_branch_name(n, config, "beit"): v for n, v in random_like(branch).items()}
    tables = [name for name in weights if name.endswith("position_bias_table")]
    small = torch.randn((2 * 4 - 1) ** 2 + 3, 2)
    for name in tables:
        weights[name] = small
    if shared:
        for name in tables:
            del weights[name]
        weights["rel_pos_bias.relative_position_bias_table"] = small
    extra = {"cls_token": torch.zeros(1, 1, 24), "fc_norm.weight": torch.zeros(24), "head.bias": torch.zeros(5)}
    extra |= {"blocks.0.attn.relative_position_index": torch.zeros(17, 17)}
    load_branch(branch, config, save({"model": weights | extra}, tmp_path / "beit.pth"))
    for block in branch.blocks:
        torch.testing.assert_close(block.attn.position_bias.table.data, resize_position_table(small, 6))
    assert torch.equal(branch.blocks[0].attn.qv_bias.value.data, weights["blocks.0.attn.v_bias"])


def test_a_table_keeps_its_centre_and_follows_timm_where_that_is_linear():
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(7 * 7, 3, generator=generator)
    resized = resize_position_table(table, 6).view(11, 11, 3)
    torch.testing.assert_close(resized[5, 5], table.view(7, 7, 3)[3, 3])
    torch.testing.assert_close(resized[5, 6], table.view(7, 7, 3)[3, 4])
    torch.testing.assert_close(resized[0, 0], table.view(7, 7, 3)[0, 0], atol=1e-3, rtol=1e-3)
    assert torch.equal(resize_position_table(torch.cat((table, torch.zeros(3, 3))), 4), table)
    # A plane over the stretched distances is reproduced by timm's linear and by our cubic interpolation alike.
    ratio = next(root.real for root in np.roots([1, 1, 1, 1 - 7]) if abs(root.imag) < 1e-9)
    steps = np.cumsum([1, ratio, ratio**2, ratio**3])
    places = torch.tensor([*-steps[::-1], 0, *steps]).float()
    plane = (2 * places[:, None] - 3 * places[None]).reshape(-1, 1)
    resized = resize_position_table(plane, 8)
    torch.testing.assert_close(resized, resize_rel_pos_bias_table(plane, (8, 8), (225, 1)), atol=1e-3, rtol=1e-3)
    assert resized[0].item() == pytest.approx(7, abs=1e-3)


def test_hugging_faces_internvit_in_shards_loads(tmp_path):
    kind = INTERNVIT | {"norm": "rmsnorm", "qk_norm": True, "qkv_bias": False}
    config = VitBranchConfig(pretrain_resolution_px=64, **NUMBERS, **kind)
    branch = Vit(config)
    ours = random_like(branch)
    names = {"embedding.proj": "embeddings.patch_embedding", "embedding.position": "embeddings.position_embedding"}
    names |= {"blocks.": "encoder.layers.", "ls1.gamma": "ls1", "ls2.gamma": "ls2"}
    theirs = {"vision_model.embeddings.class_embedding": torch.zeros(1, 1, 24)}
    for name, value in ours.items():
        for old, new in names.items():
            name = name.replace(old, new)
        theirs[f"vision_model.{name}"] = value
    shards = {"a.safetensors": dict(list(theirs.items())[:9]), "b.safetensors": dict(list(theirs.items())[9:])}
    for name, part in shards.items():
        save_file(part, tmp_path / name)
    index = {"weight_map": {key: shard for shard, part in shards.items() for key in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    load_branch(branch, config, tmp_path)
    assert all(torch.equal(value, ours[name]) for name, value in branch.state_dict().items())


def test_hugging_faces_convnext_loads(tmp_path):
    config = ConvNextBranchConfig(resolution_px=64, depths=(1, 2), widths=(8, 16))
    branch = ConvNext(config)
    ours = random_like(branch)
    theirs = {official_branch_name(name, config, "convnext"): value for name, value in ours.items()}
    theirs = {name.replace("convnext_model.", "convnext."): value for name, value in theirs.items()}
    assert "convnext.encoder.stages.1.downsampling_layer.1.weight" in theirs
    theirs |= {"convnext.layernorm.weight": torch.zeros(16), "classifier.bias": torch.zeros(3)}
    load_branch(branch, config, save(theirs, tmp_path / "pytorch_model.bin"))
    assert all(torch.equal(value, ours[name]) for name, value in branch.state_dict().items())


@pytest.mark.parametrize(
    "shard", ["../secret.safetensors", "/etc/passwd", "model.safetensors.index.json", 7, "a/b.bin"]
)
def test_an_index_never_leads_out_of_its_folder_nor_to_itself(tmp_path, shard):
    save_file({"a": torch.zeros(1)}, tmp_path / "secret.safetensors")
    inside = tmp_path / "model"
    inside.mkdir()
    (inside / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(ModelError, match=r"index") as caught:
        read_weights(inside)
    assert "\n" not in caught.value.line


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize("content", [b"", b"\x80\x02noise", b"PK\x03\x04" + bytes(60)])
def test_a_damaged_file_is_one_line(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=r"cannot be read|could run any code") as caught:
        read_weights(tmp_path / name)
    assert "\n" not in caught.value.line


@pytest.mark.parametrize(
    ("write", "name", "fix"),
    [(save_file, "w.pth", "name it .safetensors, as it is one"), (torch.save, "w.safetensors", "name it .pth")],
)
def test_a_file_with_another_formats_suffix_is_told_its_name(tmp_path, write, name, fix):
    write({"a": torch.zeros(3)}, tmp_path / name)
    with pytest.raises(ModelError, match=fix):
        read_weights(tmp_path / name)


@pytest.mark.parametrize("name", ["w.pth", "w.bin", "w.safetensors"])
def test_a_pointer_in_the_files_place_is_shown(tmp_path, name):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    with pytest.raises(ModelError, match=r"cannot be read.*it begins with 'version https://git-lfs") as caught:
        read_weights(tmp_path / name)
    assert "code" not in caught.value.line


def test_a_pickle_that_is_cut_off_says_so(tmp_path, caplog):
    whole = save({"a": torch.zeros(64)}, tmp_path / "w.pth").read_bytes()
    (tmp_path / "w.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match=r"it is cut off; download it again"):
        read_weights(tmp_path / "w.pth")
    assert "torch 1.6" not in caplog.text


def test_a_limit_on_virtual_memory_is_no_damage(tmp_path, monkeypatch):
    torch.save({"a": torch.zeros(2)}, tmp_path / "w.pth")
    monkeypatch.setattr(
        torch, "load", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("mmap: Cannot allocate memory"))
    )
    with pytest.raises(ModelError, match=r"ulimit -v") as caught:
        read_weights(tmp_path / "w.pth")
    assert "download" not in caught.value.line


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', "[" * 99999])
def test_an_index_that_is_none_is_one_line(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ModelError, match="index"):
        read_weights(tmp_path)


def test_a_network_starts_from_the_files_its_config_names(tmp_path):
    path = save({"model": timm_weights(4)}, tmp_path / "vit.pth")
    own = {"pretrain_resolution_px": 64, "embed_dim": 24, "depth": 2, "num_heads": 2}
    first = {"resolution_px": 64, "embed_dim": 32, "depth": 2, "num_heads": 2}
    second = own | {"resolution_px": 128, "pretrained": str(path)}
    unit = {"num_stages": 1, "num_heads": 4}
    model = PIIP(PiipConfig(branches=(first, second), interaction=unit))
    found = pretrained_weights(model)
    assert {name: value.shape for name, value in found.items()} == {
        name: value.shape for name, value in model.state_dict().items() if name.startswith("branches.1.")
    }
    with torch.device("meta"):
        empty = PIIP(model.config)
    assert all(torch.equal(value, found[name]) for name, value in pretrained_weights(empty).items())


def test_a_file_that_does_not_fit_is_told_in_one_line(tmp_path):
    weights = timm_weights(4)
    del weights["blocks.1.norm1.bias"]
    weights["blocks.0.mlp.fc1.weight"] = torch.zeros(5, 5)
    weights["blocks.2.norm1.bias"] = torch.zeros(24)
    config = VitBranchConfig(pretrain_resolution_px=64, **NUMBERS)
    with pytest.raises(ModelError) as raised:
        load_branch(Vit(config), config, save(weights, tmp_path / "vit.pth"))
    for part in (
        "1 missing (blocks.1.norm1.bias)",
        "1 unexpected (blocks.2.norm1.bias)",
        "1 of another shape (blocks.0.mlp.fc1.weight [5, 5] for [96, 24])",
    ):
        assert part in str(raised.value)
    assert "\n" not in str(raised.value)


class Harmful:
    def __reduce__(self):
        return print, ("ran",)


def test_a_pickle_that_would_run_code_is_refused(tmp_path, capsys):
    with pytest.raises(ModelError, match=r"could run any code.*it names (builtins\.)?print;") as raised:
        read_weights(save({"model": Harmful()}, tmp_path / "vit.pth"))
    assert "\n" not in str(raised.value)
    assert "ran" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["absent.pth", "absent.safetensors", "absent.npz"])
def test_an_absent_file_is_named(tmp_path, name):
    config = VitBranchConfig(**NUMBERS)
    with pytest.raises(ModelError, match=rf"no such file: got '.*{name}'"):
        load_branch(Vit(config), config, tmp_path / name)


def test_a_start_looks_for_the_files_first(tmp_path):
    here = tmp_path / "vit.pth"
    branch = {"resolution_px": 64, "embed_dim": 32, "depth": 2, "num_heads": 2, "pretrained": str(here)}
    config = PiipConfig(branches=(branch,))
    with pytest.raises(ModelError, match="no such file"):
        check_pretrained(config)
    here.touch()
    check_pretrained(config)


def test_a_folder_without_one_file_is_refused(tmp_path):
    with pytest.raises(ModelError, match="no single file or index"):
        read_weights(tmp_path)
