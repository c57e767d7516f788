"""Folders that other trainers leave, and what people do to them: the same weights, or one line that names the fault."""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner
from zero_files import write_checkpoint

from piip_scale.checkpoint import output
from piip_scale.checkpoint.convert import ConvertOptions, convert
from piip_scale.checkpoint.renaming import Renaming
from piip_scale.checkpoint.safetensors_writer import SafetensorsWriter
from piip_scale.cli.app import app
from piip_scale.errors import CheckpointError

PREFIX = "_forward_module.model."


def write(folder, stage=3, num_ranks=2, prefix=""):
    """A tag as DeepSpeed leaves it; returns its tensors, masters in fp32."""
    torch.manual_seed(0)
    groups = [
        {f"{prefix}a.weight": torch.randn(7, 3), f"{prefix}a.bias": torch.randn(7)},
        {f"{prefix}b": torch.randn(5)},
    ]
    frozen, buffers = {f"{prefix}f": torch.randn(3).bfloat16()}, {f"{prefix}table": torch.arange(3)}
    write_checkpoint(folder, stage, num_ranks, groups, frozen, buffers)
    return {name: tensor for part in (*groups, frozen, buffers) for name, tensor in part.items()}


def assert_written(path, wanted):
    read = load_file(path)
    assert read.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(read[name], tensor.float() if tensor.is_floating_point() else tensor), name


def model_files(folder):
    return sorted(folder.rglob("*model_states.pt"))


def change(files, **entries):
    """Other entries of files; ``None`` in the place of a value stays, ``...`` takes the entry out."""
    for file in files:
        content = torch.load(file, weights_only=False) | entries
        torch.save({key: value for key, value in content.items() if value is not ...}, file)


LAYOUTS = {
    "DeepSpeed": ("global_step9", "global_step9", "."),
    "DeepSpeed, tag": ("global_step9", "global_step9", "global_step9"),
    "DeepSpeed, its latest": ("global_step9", "global_step9", "latest"),
    "DeepSpeed, without latest": ("global_step9", None, "."),
    "released PIIP": ("iter_10/global_step9", None, "iter_10"),
    "released PIIP, work_dir": ("iter_10/global_step9", None, "."),
    "mmengine": ("iter_10.pth", None, "iter_10.pth"),
    "Lightning": ("epoch=0-step=3.ckpt/checkpoint", "checkpoint", "epoch=0-step=3.ckpt"),
    "Lightning, inside": ("x.ckpt/checkpoint", "checkpoint", "x.ckpt/checkpoint"),
    "Hugging Face's Trainer": ("checkpoint-500/global_step500", "global_step500", "checkpoint-500"),
    "Accelerate": ("state/pytorch_model", None, "state"),
    "Accelerate, inside": ("state/pytorch_model", None, "state/pytorch_model"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path, layout):
    tag, latest, given_path = LAYOUTS[layout]
    wanted = write(tmp_path / "run" / tag, stage=1 + len(layout) % 3)
    if latest:
        ((tmp_path / "run" / tag).parent / "latest").write_text(latest)
    report = convert(tmp_path / "run" / given_path, tmp_path / "out.safetensors")
    assert report.checkpoint == tmp_path / "run" / tag
    assert report.num_ranks == 2
    assert_written(tmp_path / "out.safetensors", wanted)
    assert [note for note in report.notes if "sizes and numbers of ranks were checked, and the checksums" in note]


@pytest.mark.parametrize("absent", [..., None])
def test_frozen_parameters_that_no_file_holds_are_left_out_and_said(tmp_path, absent):
    """DeepSpeed 0.8's stage 3 has no entry for them; ``exclude_frozen_parameters`` leaves it None."""
    wanted = write(tmp_path / "tag")
    change(model_files(tmp_path), frozen_param_shapes=absent, frozen_param_fragments=absent)
    report = convert(tmp_path / "tag", tmp_path / "out.safetensors")
    assert_written(tmp_path / "out.safetensors", {name: wanted[name] for name in wanted if name != "f"})
    assert [note for note in report.notes if "without frozen parameters" in note]


@pytest.mark.parametrize("name", ["mp_rank_00_model_states.pt", "piip.pth"])
@pytest.mark.parametrize("only_weights", [False, True])
def test_weights_alone(tmp_path, name, only_weights):
    wanted = write(tmp_path / "tag", stage=1)
    (file,) = model_files(tmp_path)
    if only_weights:
        torch.save({"module": torch.load(file)["module"]}, file)
    alone = shutil.move(file, tmp_path / name)
    report = convert(alone, tmp_path / "out.safetensors")
    halves = {n: t.bfloat16() if t.is_floating_point() else t for n, t in wanted.items()}
    assert_written(tmp_path / "out.safetensors", halves)
    assert [note for note in report.notes if "16-bit weights the model computed with" in note]


@pytest.mark.parametrize("name", ["mp_rank_00_model_states.pt", "piip.pth"])
def test_what_stage_3_leaves_in_a_file_alone_is_no_model(tmp_path, name):
    """It holds the weights' names, but their elements are with the optimiser's states: refused, not left out."""
    write(tmp_path / "tag")
    alone = shutil.move(model_files(tmp_path)[0], tmp_path / name)
    with pytest.raises(CheckpointError, match=r"holds nothing of 4 weights, a\.weight among them; .*give the folder"):
        convert(alone, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_prefixes(tmp_path):
    write(tmp_path / "tag", prefix=PREFIX)
    out = tmp_path / "out.safetensors"
    assert [note for note in convert(tmp_path, out).notes if "--strip _forward_module. takes it off" in note]

    def names(*strip, rename=()):
        convert(tmp_path, out, ConvertOptions(overwrite=True, renaming=Renaming(strip, rename)))
        return set(load_file(out))

    assert names(PREFIX) == {"a.weight", "a.bias", "b", "f", "table"}
    assert names("_forward_module.", "model.") == names(PREFIX)
    mapped = names("_forward_module.", rename=[("model.a.", "stem."), ("model.", "rest.")])
    assert mapped == {"stem.weight", "stem.bias", "rest.b", "rest.f", "rest.table"}
    for wrong, line in (
        ({"strip": ("backbone.",)}, r"no tensor's name starts so: got 'backbone\.'; they are like _forward"),
        ({"rename": [(f"{PREFIX}a.weight", "x"), (f"{PREFIX}a.bias", "x")]}, "would both be called x"),
        ({"strip": (f"{PREFIX}b",)}, "would be called: got ''"),
        ({"rename": [(f"{PREFIX}b", "x\ny")]}, "a name is printable text"),
    ):
        with pytest.raises(CheckpointError, match=line):
            convert(tmp_path, out, ConvertOptions(overwrite=True, renaming=Renaming(**wrong)))


class Ran:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_records_beside_the_weights(tmp_path):
    wanted, out = write(tmp_path / "tag"), tmp_path / "out.safetensors"
    numbers = {"state": np.random.get_state(), "loss": np.float32(3), "ids": np.arange(3)}
    change(model_files(tmp_path), numbers=numbers, size=torch.Size([3]))
    convert(tmp_path, out)
    assert_written(out, wanted)
    change(model_files(tmp_path), client={"args": argparse.Namespace(lr=1)})
    with pytest.raises(CheckpointError, match=r"argparse\.Namespace in client\.args.*--allow argparse\.Namespace"):
        convert(tmp_path, out, ConvertOptions(overwrite=True))
    convert(tmp_path, out, ConvertOptions(overwrite=True, allowed=["argparse.Namespace"]))
    assert_written(out, wanted)
    content = torch.load(model_files(tmp_path)[0], weights_only=False)
    torch.save(content | {"piip": [Ran(tmp_path / "ran")]}, model_files(tmp_path)[0])
    allowed = ["argparse.Namespace", "posix.mkdir"]
    with pytest.raises(CheckpointError, match=r"got \['posix\.mkdir in piip\.0'\]") as caught:
        convert(tmp_path, out, ConvertOptions(overwrite=True, allowed=allowed))
    assert "--allow" not in caught.value.line
    assert not (tmp_path / "ran").exists()
    assert_written(out, wanted)


def copied_as(folder, old, new):
    for file in folder.glob(old):
        shutil.copy(file, file.with_name(new))


FAULTS = {
    "a rank is missing": (
        lambda tag: next(tag.glob("*rank_1_*optim_states.pt")).unlink(),
        "1 files of optimizer states, none of rank 1",
    ),
    "all masters are missing": (
        lambda tag: [file.unlink() for file in tag.glob("*optim_states.pt")],
        "0 files of optimizer states, none of rank 0, 1",
    ),
    "two saves in one folder": (
        lambda tag: copied_as(tag, "*rank_0_*optim_states.pt", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"),
        "3 files of optimizer states, several of rank 0",
    ),
    "another number of ranks": (
        lambda tag: change(model_files(tag), dp_world_size=3),
        "none of rank 2; ZeRO stage 3 on 3",
    ),
    "tensor parallel": (lambda tag: change(model_files(tag), mp_world_size=2), "saved with tensor parallelism"),
    "experts": (
        lambda tag: copied_as(tag, "*rank_0_*model_states.pt", "layer_0_expert_1_mp_rank_00_model_states.pt"),
        "is of a mixture of experts",
    ),
    "pipeline": (
        lambda tag: copied_as(tag, "*rank_0_*model_states.pt", "layer_00-model_states.pt"),
        "is of pipeline parallelism",
    ),
    "truncated": (lambda tag: os.truncate(model_files(tag)[0], 900), "cannot be read: File is not a zip file"),
    "no room on disk for a record": (lambda tag: rewrite(model_files(tag)[0], claimed_bytes=1 << 40), "cannot be read"),
    "compressed": (lambda tag: rewrite(model_files(tag)[0], zipfile.ZIP_DEFLATED), "cannot be read: record"),
    "another byte order": (lambda tag: rewrite(model_files(tag)[0], byteorder=b"big"), "another byte order"),
    "a name that is a path": (lambda tag: rename_tensor(tag, "../../../etc/passwd\n"), "a tensor's name"),
}


def rewrite(path, compression=zipfile.ZIP_STORED, byteorder=b"little", claimed_bytes=None):
    """The same records in a zip file of other hands."""
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in records.items():
            is_tensor = "/data/" in name
            kind = compression if is_tensor else zipfile.ZIP_STORED
            archive.writestr(name, byteorder if name.endswith("byteorder") else data, kind)
        for info in archive.infolist():
            # The directory, which is written last, may say what it likes.
            info.file_size = claimed_bytes if claimed_bytes and "/data/" in info.filename else info.file_size


def rename_tensor(tag, name):
    content = torch.load(model_files(tag)[0])
    content["module"][name] = torch.zeros(1)
    torch.save(content, model_files(tag)[0])


@pytest.mark.parametrize("fault", FAULTS)
def test_one_line_for_each_fault(tmp_path, fault):
    damage, line = FAULTS[fault]
    write(tmp_path / "tag")
    damage(tmp_path / "tag")
    with pytest.raises(CheckpointError) as caught:
        convert(tmp_path, tmp_path / "out.safetensors")
    assert line in caught.value.line
    assert "\n" not in caught.value.line
    assert os.listdir(tmp_path) == ["tag"]


def test_several_checkpoints_without_latest_are_named(tmp_path):
    for step in (1, 2):
        write(tmp_path / f"iter_{step}" / f"global_step{step}")
    with pytest.raises(
        CheckpointError, match="holds 2 DeepSpeed checkpoints: iter_1/global_step1, iter_2/global_step2"
    ):
        convert(tmp_path, tmp_path / "out.safetensors")


def test_numbers_too_large_for_fp16_are_named_and_not_written(tmp_path):
    write_checkpoint(tmp_path / "tag", 2, 2, [{"a": torch.tensor([1.0, 1e6, math.inf, -7e4])}], {}, {})
    with pytest.raises(
        CheckpointError, match=r"a holds numbers too large for float16: got 1000000\.0.*write bf16 or fp32"
    ):
        convert(tmp_path, tmp_path / "out.safetensors", ConvertOptions(dtype="fp16"))
    assert os.listdir(tmp_path) == ["tag"]


def test_the_manifest_has_a_checksum_a_tensor(tmp_path):
    wanted = write(tmp_path / "tag")
    for dtype in ("fp32", "bf16"):
        convert(tmp_path, tmp_path / "out.safetensors", ConvertOptions(dtype=dtype, overwrite=True))
        manifest = json.loads((tmp_path / "out.manifest.json").read_text())
        read = load_file(tmp_path / "out.safetensors")
        assert list(manifest["tensors"]) == list(wanted)
        assert (manifest["num_ranks"], manifest["zero_stage"], manifest["checkpoint"]) == (2, 3, "tag")
        for name, entry in manifest["tensors"].items():
            content = read[name].reshape(-1).view(torch.uint8).numpy().tobytes()
            assert entry["crc32"] == f"{zlib.crc32(content):08x}"
            assert (entry["shape"], entry["file"]) == (list(read[name].shape), "out.safetensors")


def test_a_manifest_alone_is_replaced_and_another_file_of_its_name_is_not(tmp_path):
    write(tmp_path / "tag")
    out, manifest = tmp_path / "out.safetensors", tmp_path / "out.manifest.json"
    convert(tmp_path, out)
    out.unlink()
    convert(tmp_path, out, ConvertOptions(dtype="bf16"))
    assert '"BF16"' in manifest.read_text()
    out.unlink()
    manifest.write_text('{"mine": 1}')
    with pytest.raises(CheckpointError, match=r"out\.manifest\.json exists"):
        convert(tmp_path, out)
    assert manifest.read_text() == '{"mine": 1}'


def test_a_disk_that_keeps_other_bytes_is_found_by_verify(tmp_path, monkeypatch):
    write(tmp_path / "tag")

    class Forgetful(SafetensorsWriter):
        def write(self, name, first, data):
            super().write(name, first, memoryview(bytes(len(data))) if name == "b" else data)

    monkeypatch.setattr("piip_scale.checkpoint.convert.SafetensorsWriter", Forgetful)
    with pytest.raises(CheckpointError, match=r"b was written to .* and reads back otherwise"):
        convert(tmp_path, tmp_path / "out.safetensors", ConvertOptions(verify=True))
    assert os.listdir(tmp_path) == ["tag"]


@pytest.mark.parametrize("is_folder", [False, True])
def test_two_at_once_do_not_write_one_output(tmp_path, is_folder):
    write(tmp_path / "tag")
    out = tmp_path / ("out" if is_folder else "out.safetensors")
    options = ConvertOptions(max_shard_gb=1.0 if is_folder else None)
    with output.Replacing(out, is_folder=is_folder) as first:
        with pytest.raises(CheckpointError, match="another process is writing"):
            convert(tmp_path, out, options)
        assert first.path.exists()
        (first.path / "x" if is_folder else first.path).write_text("whole")
        first.write_manifest("{}")
    assert out.exists()
    convert(tmp_path, out, ConvertOptions(max_shard_gb=options.max_shard_gb, overwrite=True))


LIMITED = """
import resource, sys
from pathlib import Path
from piip_scale.cli.main import main
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv.pop(1)),) * 2)
try:
    main()
finally:
    print([name for name in ("torch", "deepspeed", "mmdet", "mmengine") if name in sys.modules])
    print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""


def test_address_space_of_half_more_than_the_largest_file_is_enough(tmp_path):
    """And neither torch nor DeepSpeed are loaded, nor is the file in memory."""
    part = torch.empty(30_000_000)
    with torch.serialization.skip_data():
        state = {"zero_stage": 3, "fp32_flat_groups": [part], "moments": [torch.empty_like(part) for _ in range(2)]}
        torch.save({"optimizer_state_dict": state}, tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    shapes = [{"a": torch.Size([3000, 5000]), "b": torch.Size([15_000_000])}]
    module = {name: torch.empty(0) for name in shapes[0]}
    model = {"module": module, "param_shapes": shapes, "dp_world_size": 1, "frozen_param_shapes": None}
    torch.save(model | {"frozen_param_fragments": {}}, tmp_path / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    largest = max(file.stat().st_size for file in tmp_path.iterdir())
    out = tmp_path / "out.safetensors"
    command = [sys.executable, "-c", LIMITED, int(1.5 * largest), "convert", tmp_path, out, "--dtype", "bf16"]
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr
    slow, peak_kib = done.stdout.splitlines()[-2:]
    assert slow == "[]"
    assert int(peak_kib) << 10 < 120 << 20
    assert out.stat().st_size > 60_000_000


def test_the_command_says_what_it_did(tmp_path):
    write(tmp_path / "tag", prefix=PREFIX)
    out = str(tmp_path / "out.safetensors")
    done = CliRunner().invoke(app, ["convert", str(tmp_path), out, "--strip", PREFIX, "--rename", "a.=c.", "--verify"])
    assert done.exit_code == 0
    assert "parameters of ZeRO stage 3 on 2 ranks" in done.stdout
    assert "MB/s" in done.stdout
    assert "compared with what was written" in done.stdout
    assert set(load_file(out)) == {"c.weight", "c.bias", "b", "f", "table"}
