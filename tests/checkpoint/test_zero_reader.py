import os
import shutil
import subprocess
import sys

import pytest
import torch
from preloaded import run_ranks
from zero_saver import NOT_FOR_THE_ORACLE, VARIANTS, save_all

from piip_scale.checkpoint import layout
from piip_scale.checkpoint.store import resolve_checkpoint
from piip_scale.checkpoint.zero_reader import ZeroCheckpoint
from piip_scale.errors import CheckpointError


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints that DeepSpeed wrote on two ranks, one folder per variant."""
    root = tmp_path_factory.mktemp("zero")
    run_ranks(2, save_all, root)
    return root


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_the_live_model_bit_for_bit(saved, variant):
    reader = ZeroCheckpoint(resolve_checkpoint(saved / variant))
    live = torch.load(saved / variant / "live.pt")
    assert reader.stage == VARIANTS[variant][0]["stage"]
    assert reader.num_ranks == 2
    assert list(reader) == list(live)
    for name, value in live.items():
        assert reader[name].dtype == value.dtype, name
        assert torch.equal(reader[name], value), name
    assert [name for name, weight in reader.weights.items() if weight.is_buffer] == [
        "table",
        "norm.running_mean",
        "norm.running_var",
        "norm.num_batches_tracked",
    ]


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in NOT_FOR_THE_ORACLE])
def test_equals_deepspeeds_own_tool(saved, variant):
    reader = ZeroCheckpoint(resolve_checkpoint(saved / variant))
    oracle = torch.load(saved / variant / "oracle.pt")
    assert len(oracle) >= 12
    for name, value in oracle.items():
        assert torch.equal(reader[name].float(), value.float()), name
    # What the tool leaves out: modules registered twice, and frozen parameters in stage 1.
    extra = {"again.weight", "again.bias"} | ({"frozen.weight", "frozen.bias"} if "stage1" in variant else set())
    assert set(reader) - set(oracle) == extra


def test_a_second_name_reads_the_same_master(saved):
    reader = ZeroCheckpoint(resolve_checkpoint(saved / "stage2_bf16"))
    master = reader["stem.weight"]
    assert not torch.equal(master, master.bfloat16().float())
    for name in ("again.weight", "back.weight"):
        assert reader.weights[name] is reader.weights["stem.weight"]


def test_reading_needs_no_deepspeed(saved):
    code = (
        "import sys; from piip_scale.checkpoint.zero_reader import ZeroCheckpoint;"
        "assert all(v.device.type == 'cpu' for v in ZeroCheckpoint(sys.argv[1]).values());"
        "assert not [m for m in sys.modules if m.startswith('deepspeed')]"
    )
    subprocess.run([sys.executable, "-c", code, resolve_checkpoint(saved / "stage3_bf16")], check=True, timeout=240)


@pytest.fixture
def copied(saved, tmp_path):
    folder = tmp_path / "copied"
    shutil.copytree(resolve_checkpoint(saved / "stage3_bf16"), folder)
    return folder / "zero"


def test_a_missing_rank_is_named(copied):
    next(copied.glob("*pp_rank_1_*optim_states.pt")).unlink()
    with pytest.raises(
        CheckpointError, match=r"1 files of optimizer states, none of rank 1; ZeRO stage 3 on 2 ranks writes 2"
    ):
        ZeroCheckpoint(copied)


@pytest.mark.parametrize("damage", ["truncate", "empty", "noise"])
def test_a_broken_file_is_named(copied, damage):
    victim = next(copied.glob("*pp_rank_0_*optim_states.pt"))
    if damage == "truncate":
        os.truncate(victim, victim.stat().st_size // 2)
    else:
        victim.write_bytes(b"" if damage == "empty" else b"\x93" * 5000)
    with pytest.raises(CheckpointError, match=f"{victim} cannot be read") as caught:
        ZeroCheckpoint(copied)
    assert "\n" not in caught.value.line


class Evil:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_code_inside_a_pickle_is_not_run(copied, tmp_path):
    victim = next(copied.glob("*pp_rank_0_*model_states.pt"))
    content = torch.load(victim, weights_only=False)
    torch.save(content | {"piip": Evil(tmp_path / "ran")}, victim)
    with pytest.raises(CheckpointError, match=r"objects that could run code when read: got \['posix\.mkdir in piip'\]"):
        ZeroCheckpoint(copied)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("shapes", [{"stem.weight": [7, 6]}, {"extra": [1]}])
def test_shapes_that_do_not_fit_are_refused(copied, shapes):
    victim = next(copied.glob("*pp_rank_0_*model_states.pt"))
    content = torch.load(victim, weights_only=False)
    content["param_shapes"][0] |= {name: torch.Size(shape) for name, shape in shapes.items()}
    torch.save(content, victim)
    with pytest.raises(CheckpointError, match="flat tensor"):
        ZeroCheckpoint(copied)


def test_a_limit_on_virtual_memory_is_no_damage(copied, monkeypatch):
    def refuse(*_, **__):
        raise MemoryError

    monkeypatch.setattr("piip_scale.checkpoint.torch_file.unpickle", refuse)
    with pytest.raises(CheckpointError, match=r"no room.*address space.*ulimit -v") as caught:
        ZeroCheckpoint(copied)
    assert "take another checkpoint" not in caught.value.line


def test_parameters_dealt_to_ranks_in_turns_are_read_where_they_are(tmp_path):
    """DeepSpeed's ``round_robin_gradients``: the files say where each parameter is, in whatever order."""
    shapes = [{"a": (3,), "b": (2, 2), "c": (1,)}]
    ranges = [[{"a": (0, 3), "c": (3, 1)}], [{"b": (0, 4)}]]
    slices = layout.slices_of_mappings(shapes, ranges)
    assert {name: [(s.rank, s.first, s.start, s.length) for s in of] for name, of in slices.items()} == {
        "a": [(0, 0, 0, 3)],
        "b": [(1, 0, 0, 4)],
        "c": [(0, 0, 3, 1)],
    }
    for wrong in ([[{"a": (0, 3), "c": (3, 1)}], [{"b": (0, 3)}]], [[{"a": (-1, 3), "c": (3, 1)}], [{"b": (0, 4)}]]):
        with pytest.raises(CheckpointError):
            layout.slices_of_mappings(shapes, wrong)


def test_a_folder_without_a_checkpoint_says_so(tmp_path):
    with pytest.raises(CheckpointError, match="holds no DeepSpeed checkpoints"):
        ZeroCheckpoint(tmp_path)
