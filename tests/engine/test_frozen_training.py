"""Frozen parts of a network: never updated, without gradients and optimiser state, kept by checkpoints."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from pyramid_task import PyramidTask, network, pyramid_config
from ranks import FORCED_RELEASE, run_ranks
from safetensors.torch import load_file, save_file
from test_equality import weights_of
from tiny_task import make_batch

from piip_scale.checkpoint.convert import ConvertOptions, convert
from piip_scale.checkpoint.zero_reader import ZeroCheckpoint
from piip_scale.engine.checkpointing import Checkpointer
from piip_scale.engine.resuming import find_checkpoint
from piip_scale.engine.start_weights import start_weights
from piip_scale.engine.step import train_step
from piip_scale.engine.zero.building import fill, load_whole
from piip_scale.engine.zero.setup import build_engine, build_model, give_blanks, give_weights
from piip_scale.errors import CheckpointError, ConfigError, ModelError
from piip_scale.models.frozen_files import describe_left_out, moved, reader_of
from piip_scale.models.official_keys import official_branch_name
from piip_scale.models.vit import Vit
from piip_scale.ops.stored_linear import store
from piip_scale.world import World

# Checkpointed blocks below and above the border: the reentrant kind of checkpointing would lose gradients here.
STEM = {"large": {"frozen_blocks": 2, "checkpoint_blocks": True}}
FROM_FILE = {"large": {"frozen_blocks": 3, "pretrained": "large.safetensors", "frozen_dtype": "fp8"}}
IN_8_BITS = {"large": {"frozen_blocks": "all", "frozen_dtype": "int8"}, "small": {"frozen_blocks": 1}}
LORA = {"rank": 2, "alpha": 3.0, "targets": ["qkv", "proj", "mlp"]}
ADDED = {"large": {"frozen_blocks": 1, "checkpoint_blocks": True, "pretrained": "large.safetensors"}}
ADDED["large"] |= {"lora": LORA | {"targets": ["qkv", "mlp"]}, "frozen_dtype": "int8"}
WHOLE = {"large": {"frozen_blocks": "all", "checkpoint_blocks": True}, "small": {"frozen_blocks": 1}}
# The parts of DINOv3 and its like, in frozen blocks and in trained ones.
PARTS = {"rotary": {}, "position_embedding": False, "class_token": True, "register_tokens": 2, "key_bias": False}
PARTS |= {"feed_forward": "swiglu", "mlp_multiple": 8}
FOUNDATION = {"large": STEM["large"] | PARTS, "small": {"rotary": {}, "register_tokens": 1, "feed_forward": "swiglu"}}
# A giant as DINOv3's, by a file of timm's, in 8 bits: without a graph, or with additions that are trained.
GIANT = {"preset": "dinov3_s_plus", "register_tokens": 2, "pretrained": "giant.safetensors"}
ONE_WAY = {"num_stages": 2, "num_heads": 2, "gamma_init": 0.1, "direction": "to_small"}
ALONE = {"large": GIANT | {"frozen_blocks": "all", "frozen_dtype": "fp8"}, "small": FOUNDATION["small"]}
ALONE |= {"interaction": ONE_WAY}
ADDED_TO = {"frozen_blocks": 1, "frozen_dtype": "int8", "lora": LORA, "checkpoint_blocks": True}
CASES = {
    "foundation model": (FOUNDATION, 3, "fp32"),
    "stem": (STEM, 3, "fp32"),
    "whole branch": (WHOLE, 3, "fp32"),
    "stem in bf16": (STEM, 3, "bf16"),
    "stem at stage 1 in bf16": (STEM, 1, "bf16"),
    "in 8 bits": (IN_8_BITS, 3, "bf16"),
    "left out": (ADDED, 3, "bf16"),
    "left out at stage 1": (FROM_FILE, 1, "fp32"),
    "giant": (ALONE, 3, "fp32"),
    "giant with additions": (ALONE | {"large": GIANT | ADDED_TO}, 3, "fp32"),
}
LEFT_OUT = [case for case in CASES if "left out" in case]
GIANTS = [case for case in CASES if "giant" in case]


def config_of(case: str, folder: Path = Path()):
    frozen, stage, precision = CASES[case]
    large = frozen["large"]
    if "pretrained" in large:
        frozen = frozen | {"large": large | {"pretrained": str(folder / large["pretrained"])}}
    return pyramid_config(
        network(**frozen),
        optimizer={"lr": 1e-2},
        zero={"stage": stage, "deepspeed": FORCED_RELEASE if stage == 3 else {}},
        train={"precision": precision, "background_saves": False, "save_frozen": case not in LEFT_OUT + GIANTS},
    )


def write_large(path: Path) -> None:
    """Weights of the large branch by the names of their release, other ones than its own first draw."""
    torch.manual_seed(7)
    config = pyramid_config().model.branches[0]
    weights = {name: torch.randn(tensor.shape) / 8 for name, tensor in Vit(config).state_dict().items()}
    save_file({official_branch_name(name, config, "deit"): tensor for name, tensor in weights.items()}, path)


def write_giant(path: Path) -> None:
    """Weights of the giant by timm's names."""
    import timm

    torch.manual_seed(8)
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 2, "num_reg_tokens": 2}
    giant = timm.create_model("vit_small_plus_patch16_dinov3_qkvb", num_classes=0, **sizes)
    for parameter in giant.parameters():
        torch.nn.init.normal_(parameter, std=1 / 8)
    save_file(giant.state_dict(), path)


def steps(engine, world, first: int, last: int) -> list[tuple[float, float]]:
    found = []
    for step in range(first, last):
        result = train_step(engine, [make_batch(step * 2 + world.rank, 1)], step, 0, world)
        loss = result.losses["loss"]
        torch.distributed.all_reduce(loss)
        found.append((loss.item() / world.num_ranks, result.grad_norm))
    return found


def trained(world, device, folder: Path) -> dict[str, dict]:
    """Four steps with a checkpoint after the second, and the last two again from there."""
    found = {}
    for name in CASES:
        config = config_of(name, folder)

        def begin(give, config=config, path=folder / name):
            task = PyramidTask(config, world)
            engine, _ = build_engine(build_model(task, 0), config, world, give=give)
            return engine, Checkpointer(engine, path, config, world, task.num_train_batches())

        engine, checkpointer = begin(give_weights)
        start, trace = weights_of(engine), steps(engine, world, 0, 2)
        checkpointer.save(2)
        checkpointer.finish()
        trace += steps(engine, world, 2, 4)
        moments = [state["exp_avg"] for state in engine.optimizer.optimizer.state.values()]
        again, checkpointer = begin(give_blanks)
        assert find_checkpoint(folder / name).resume(again, checkpointer.describe(0)) == 2
        found[name] = {
            "start": start,
            "end": weights_of(engine),
            "trace": trace,
            "resumed": (steps(again, world, 2, 4), weights_of(again)),
            "moments": sum(moment.numel() for moment in moments),
            "gradients": [n for n, p in engine.module.named_parameters() if p.grad is not None and not p.requires_grad],
            "frozen": [n for n, p in engine.module.named_parameters() if not p.requires_grad],
        }
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("frozen")
    write_large(folder / "large.safetensors")
    write_giant(folder / "giant.safetensors")
    return folder, run_ranks(2, trained, folder)


def expected_names(case: str) -> set[str]:
    large, small = "backbone.branches.0.", "backbone.branches.1."
    if case in GIANTS:
        return {large}
    if case in ("whole branch", "in 8 bits"):
        return {large, f"{small}embedding.", f"{small}blocks.0."}
    found = {f"{large}embedding.", f"{large}blocks.0.", f"{large}blocks.1."}
    if case == "foundation model":
        found |= {f"{large}class_token.", f"{large}registers."}
    return found | {f"{large}blocks.{block}." for block in (2, 3)[: 1 + (case == "left out")] if case in LEFT_OUT}


@pytest.mark.parametrize("case", CASES)
def test_only_the_rest_moves_and_has_state(results, case):
    first, second = (rank[case] for rank in results[1])
    frozen = set(first["frozen"])
    of_frozen = {name for name in first["start"] if name.startswith(tuple(expected_names(case)))}
    assert frozen == {name for name in of_frozen if ".lora." not in name}
    for name, weight in first["start"].items():
        assert np.array_equal(first["end"][name], weight) == (name in frozen), name
    assert first["gradients"] == second["gradients"] == []
    trainable = sum(weight.size for name, weight in first["start"].items() if name not in frozen)
    # A rank's share of every parameter, padded to the same on all ranks.
    assert trainable / 2 <= first["moments"] <= trainable / 2 + len(first["start"]) + 2


@pytest.mark.parametrize("case", ["foundation model", "stem", "whole branch"])
def test_it_trains_as_torch_alone(results, case):
    model = build_model(PyramidTask(config_of(case), World()), 0)
    fill(model, {}, 0, load_whole(torch.device("cpu")))
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rules = {id(p): model.parameter_rules()[name].decays for name, p in model.named_parameters()}
    groups = [{"params": [p], "weight_decay": 0.05 * rules[id(p)]} for p in trainable]
    optimizer = torch.optim.AdamW(groups, lr=config_of(case).optimizer.lr)
    trace = []
    for step in range(2):
        optimizer.zero_grad()
        losses = [model(make_batch(step * 2 + rank, 1))["loss"] / 2 for rank in range(2)]
        torch.stack(losses).sum().backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in trainable if p.grad is not None]).item()
        trace.append((sum(loss.item() for loss in losses), norm))
        optimizer.step()
    np.testing.assert_allclose(results[1][0][case]["trace"][:2], trace, rtol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_checkpoints_keep_frozen_parts(results, case):
    folder, ranks = results
    given = reader_of(config_of(case, folder).model) if case in LEFT_OUT + GIANTS else None
    checkpoint = ZeroCheckpoint(folder / case / "step_00000002", given=given)
    start = ranks[0][case]["start"]
    assert set(start) <= set(checkpoint)
    for name in ranks[0][case]["frozen"]:
        # What a file holds is not rounded to the run's precision.
        saved = checkpoint[name]
        if saved.is_floating_point():
            saved = saved.to(torch.bfloat16 if "bf16" in CASES[case] else torch.float32)
        np.testing.assert_array_equal(saved.float().numpy(), start[name], err_msg=name)
    for rank in ranks:
        trace, weights = rank[case]["resumed"]
        assert trace == rank[case]["trace"][2:]
        for name, weight in rank[case]["end"].items():
            np.testing.assert_array_equal(weights[name], weight, err_msg=name)


def test_a_converted_foundation_model_has_the_loss_of_the_step_after_its_save(results, tmp_path):
    (folder, ranks), case, out = results, "foundation model", tmp_path / "whole.safetensors"
    convert(folder / case / "step_00000002", out, ConvertOptions(verify=True))
    model = build_model(PyramidTask(config_of(case), World()), 0)
    model.load_state_dict(load_file(out), assign=True)
    with torch.no_grad():
        losses = [model(make_batch(4 + rank, 1))["loss"].item() for rank in range(2)]
    np.testing.assert_allclose(sum(losses) / 2, ranks[0][case]["trace"][2][0], rtol=1e-5)


@pytest.mark.parametrize("case", GIANTS)
def test_a_giant_and_what_was_trained_beside_it_convert_to_the_loss_of_the_step_after_the_save(results, case, tmp_path):
    (folder, ranks), out = results, tmp_path / "whole.safetensors"
    checkpoint, config = folder / case / "step_00000002", config_of(case, folder)
    assert not set(ranks[0][case]["frozen"]) & set(ZeroCheckpoint(checkpoint))
    convert(checkpoint, out, ConvertOptions(given=reader_of(config.model), verify=True))
    if case == "giant with additions":
        # Merged, its weights are floats.
        config = pyramid_config(network(**ALONE | {"large": GIANT | {"frozen_blocks": "all"}}))
    model = build_model(PyramidTask(config, World()), 0)
    model.load_state_dict(load_file(out), assign=True)
    with torch.no_grad():
        losses = [model(make_batch(4 + rank, 1))["loss"].item() for rank in range(2)]
    np.testing.assert_allclose(sum(losses) / 2, ranks[0][case]["trace"][2][0], rtol=1e-5)


@pytest.mark.parametrize("case", LEFT_OUT)
def test_a_checkpoint_without_frozen_parts_is_small_and_converts_to_a_whole_model(results, case, tmp_path):
    folder, ranks = results
    checkpoint, out = folder / case / "step_00000002", tmp_path / "whole.safetensors"
    frozen = set(ranks[0][case]["frozen"])
    assert not frozen & set(ZeroCheckpoint(checkpoint))
    files = [torch.load(path, weights_only=False) for path in checkpoint.glob("zero/*model_states.pt")]
    held = {
        n
        for file in files
        for key in ("module", "frozen_param_fragments")
        for n, v in (file[key] or {}).items()
        if v.numel()
    }
    assert not held & frozen
    with pytest.raises(CheckpointError, match=r"leaves \d+ frozen weights to a file of pretrained ones"):
        convert(checkpoint, out)
    given = reader_of(config_of(case, folder).model)
    convert(checkpoint, out, ConvertOptions(given=given, verify=True))
    written, source = load_file(out), load_file(folder / "large.safetensors")
    saved, config = ZeroCheckpoint(checkpoint, given=given), pyramid_config().model.branches[0]
    gone = (".lora.", ".weight_scale") if case == "left out" else ()
    names = {name for name in ranks[0][case]["start"] if not any(part in name for part in gone)}
    assert set(written) == names | {"head.offset"}
    for name in frozen & names:
        file_name = name.removeprefix("backbone.branches.0.").replace(".weight_scale", ".weight")
        own = source[official_branch_name(file_name, config, "deit")]
        stem = name.removesuffix(".weight")
        if name.endswith(".weight_scale"):
            assert torch.equal(written[name], store(own, "fp8")[1]), name
        elif written[name].dtype == torch.uint8:
            assert torch.equal(written[name], store(own, "fp8")[0]), name
        elif f"{stem}.weight_scale" in saved:
            numbers, scale = store(own, "int8")
            assert torch.equal(saved[name], numbers), name
            own = numbers * scale[:, None]
            if f"{stem}.lora.up" in saved:
                assert saved[f"{stem}.lora.up"].any()
                own = own + 1.5 * saved[f"{stem}.lora.up"] @ saved[f"{stem}.lora.down"]
            assert (own - written[name]).abs().max() < 1e-6, name
        else:
            assert torch.equal(written[name], own), name


def test_merged_weights_start_a_training_with_additions(results, tmp_path):
    folder, _ = results
    out = tmp_path / "merged.safetensors"
    given = reader_of(config_of("left out", folder).model)
    convert(folder / "left out" / "step_00000002", out, ConvertOptions(given=given))
    config = pyramid_config(network(large={"lora": LORA}, pretrained=str(out)))
    model = build_model(PyramidTask(config, World()), 0)
    assert set(start_weights(model, config).tensors) == {name for name in model.state_dict() if ".lora." not in name}


def test_another_file_is_refused_and_a_moved_one_is_known_by_its_checksum(results, tmp_path):
    folder, ranks = results
    model = config_of("left out", folder).model
    record = describe_left_out(model, ranks[0]["left out"]["frozen"])
    elsewhere, other = tmp_path / "same.safetensors", tmp_path / "other.safetensors"
    elsewhere.write_bytes((folder / "large.safetensors").read_bytes())
    changed = bytearray(elsewhere.read_bytes())
    changed[-1] ^= 1
    other.write_bytes(changed)
    assert set(reader_of(moved(model, record, [elsewhere]))(record)) == set(record["names"])
    with pytest.raises(
        ModelError, match=r"other.safetensors are not those that the checkpoint left its frozen weights"
    ):
        moved(model, record, [other])
    branch = model.branches[0].model_copy(update={"pretrained": str(other)})
    changed_model = model.model_copy(update={"branches": (branch, *model.branches[1:])})
    with pytest.raises(ModelError, match=r"large.safetensors of \d+ bytes with CRC-32"):
        reader_of(changed_model)(record)
    gone = branch.model_copy(update={"pretrained": str(tmp_path / "gone")})
    with pytest.raises(ModelError, match=r"model.branches.0.pretrained is not there"):
        reader_of(model.model_copy(update={"branches": (gone, *model.branches[1:])}))(record)


def test_there_must_be_something_to_leave_out():
    with pytest.raises(ConfigError, match=r"train.save_frozen=False leaves out what pretrained weights bring"):
        pyramid_config(network(**STEM), train={"save_frozen": False})
