import errno
import itertools
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import preloaded
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from zero_files import write_checkpoint

from piip_scale.checkpoint.convert import ConvertOptions, convert
from piip_scale.checkpoint.dtypes import of_torch
from piip_scale.checkpoint.hub_layout import INDEX
from piip_scale.checkpoint.origin import STATE_FILE, own_config
from piip_scale.checkpoint.safetensors_writer import Entry, SafetensorsWriter, in_file_order
from piip_scale.checkpoint.store import CheckpointStore
from piip_scale.config.loading import check_config, config_text, load_config
from piip_scale.errors import CheckpointError

CONFIG = load_config(Path(__file__).parents[2] / "configs" / "demo" / "digits.py")


def make_run(run_dir, numel=64, num_weights=4, num_ranks=2):
    """A run directory with a config and one committed checkpoint of step 7; returns its tensors."""
    torch.manual_seed(0)
    weights = {f"layer.{index}.weight": torch.randn(numel) for index in range(num_weights)}
    frozen = {"stem.weight": torch.randn(5, 3).bfloat16()}
    buffers = {"table": torch.arange(3), "mean": torch.randn(3).bfloat16(), "seen": torch.tensor(True)}
    store = CheckpointStore(run_dir / "checkpoints", keep=1)
    write_checkpoint(store.begin(7) / "zero", 3, num_ranks, [weights], frozen, buffers)
    (store.staging(7) / STATE_FILE).write_text(json.dumps({"config": CONFIG.model_dump(mode="json")}))
    store.commit(7)
    # Whatever lies two folders up is not the checkpoint's.
    (run_dir / "config.py").write_text('password = "hunter2"\n')
    return weights, frozen, buffers


def assert_equal(read, wanted):
    assert read.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert read[name].dtype == tensor.dtype, name
        assert torch.equal(read[name], tensor), name


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_one_file(tmp_path, dtype):
    weights, frozen, buffers = make_run(tmp_path)
    out, told = tmp_path / "model.safetensors", []
    report = convert(tmp_path, out, ConvertOptions(dtype=dtype), lambda *numbers: told.append(numbers))
    cast = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    wanted = {name: tensor.to(cast) for name, tensor in (weights | frozen).items()}
    wanted |= buffers | {"mean": buffers["mean"].float()}
    assert_equal(load_file(out), wanted)
    with safe_open(out, "pt") as file:
        assert file.metadata() == {
            "format": "pt",
            "piip_scale_format": "1",
            "step": "7",
            "config": config_text(CONFIG),
        }
    assert (report.step, report.files, report.notes) == (7, (out,), ())
    assert report.num_parameters == 4 * 64 + 15
    assert told[-1] == (report.num_bytes, report.num_bytes)
    assert all(a < b for (a, _), (b, _) in itertools.pairwise(told))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "checkpoints",
        "config.py",
        "model.manifest.json",
        "model.safetensors",
    ]


def beside(out):
    """What a conversion leaves there."""
    return ["model.manifest.json", out.name] if out.suffix else [out.name]


def metadata_of(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def test_a_checkpoint_without_a_config_publishes_none_and_says_so(tmp_path):
    make_run(tmp_path)
    checkpoint = tmp_path / "checkpoints" / "step_00000007"
    (checkpoint / STATE_FILE).unlink()
    (checkpoint / "manifest.json").unlink()
    report = convert(checkpoint / "zero", tmp_path / "model.safetensors")
    assert metadata_of(tmp_path / "model.safetensors") == {"format": "pt", "piip_scale_format": "1", "step": "0"}
    assert [note.partition(":")[0] for note in report.notes] == [
        "no manifest of ours",
        "the checkpoint holds no config, so the file has none in its metadata",
    ]


def test_frozen_parameters_that_were_left_out_are_said(tmp_path):
    make_run(tmp_path)
    zero = tmp_path / "checkpoints" / "step_00000007" / "zero"
    for file in zero.glob("*model_states.pt"):
        content = torch.load(file)
        del content["module"]["stem.weight"]
        torch.save(content | {"frozen_param_shapes": None, "frozen_param_fragments": None}, file)
    report = convert(zero.rename(tmp_path / "elsewhere"), tmp_path / "model.safetensors")
    assert "stem.weight" not in load_file(tmp_path / "model.safetensors")
    assert [note for note in report.notes if "without frozen parameters" in note]


@pytest.mark.parametrize(
    ("location", "published"),
    [
        ("s3://AKIAKEY:hunter2@bucket/train", "s3://bucket/train"),
        ("https://me:hunter2@host/train", "https://host/train"),
        ("https://host/{name}?X-Amz-Signature=hunter2", "https://host/{name}"),
        ("pipe:curl -H 'Authorization: Bearer hunter2' https://host/{name}", "pipe:removed"),
        ("pipe:true\nhunter2", "pipe:removed"),
        ("/data/train", "/data/train"),
        ("s3://bucket/train", "s3://bucket/train"),
    ],
)
def test_secrets_of_a_location_are_not_published(tmp_path, location, published):
    values = CONFIG.model_dump(mode="json")
    values["data"] |= {"train_shards": location, "val_shards": "/data/val"}
    (tmp_path / STATE_FILE).write_text(json.dumps({"config": values}))
    own = own_config(tmp_path)
    assert "hunter2" not in own.text + own.note
    assert ("data.train_shards" in own.note) == (location != published)
    values["data"]["train_shards"] = published
    assert own.text == config_text(check_config(values))


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"config": 3}', '{"config": {"passwort": "hunter2"}}', "[" * 99999]
)
def test_a_description_that_is_none_publishes_nothing(tmp_path, content):
    (tmp_path / STATE_FILE).write_text(content)
    assert own_config(tmp_path).text == ""
    assert "cannot be read" in own_config(tmp_path).note


@pytest.mark.parametrize("name", ["best", "step_00000120", "epoch=3 (copy)"])
def test_a_renamed_checkpoint_is_known_by_its_manifest(tmp_path, name):
    weights, *_ = make_run(tmp_path)
    renamed = (tmp_path / "checkpoints" / "step_00000007").rename(tmp_path / "checkpoints" / name)
    for index, named in enumerate((renamed, renamed / "zero", tmp_path)):
        assert convert(named, tmp_path / f"{index}.safetensors").step == 7
    assert len(load_file(tmp_path / "0.safetensors")) >= len(weights)


def test_several_files_as_on_the_hub(tmp_path):
    weights, frozen, buffers = make_run(tmp_path)
    out = tmp_path / "model"
    report = convert(tmp_path / "checkpoints" / "latest", out, ConvertOptions(max_shard_gb=600e-9))
    index = json.loads((out / INDEX).read_text())
    assert [file.name for file in report.files] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    read = {}
    for file in report.files:
        part = load_file(file)
        assert sum(t.nbytes for t in part.values()) <= 600
        assert all(index["weight_map"][name] == file.name for name in part)
        read |= part
    assert_equal(
        read, weights | buffers | {"stem.weight": frozen["stem.weight"].float(), "mean": buffers["mean"].float()}
    )
    assert index["metadata"]["total_size"] == report.num_bytes == sum(t.nbytes for t in read.values())


def test_an_output_in_the_way_is_refused_and_kept(tmp_path):
    make_run(tmp_path)
    out = tmp_path / "model.safetensors"
    out.write_text("mine")
    with pytest.raises(CheckpointError, match=r"model\.safetensors exists"):
        convert(tmp_path, out)
    assert out.read_text() == "mine"
    convert(tmp_path, out, ConvertOptions(overwrite=True))
    assert len(load_file(out)) == 8
    folder = tmp_path / "model"
    for size in (600e-9, 1.0):
        convert(tmp_path, folder, ConvertOptions(max_shard_gb=size, overwrite=True))
    assert sorted(p.name for p in folder.iterdir()) == [
        "model-00001-of-00001.safetensors",
        "model.manifest.json",
        INDEX,
    ]
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize(
    ("out", "options", "message"),
    [
        ("model.bin", {}, r"one file ends in \.safetensors"),
        ("model.safetensors", {"max_shard_gb": 1.0}, "the output is a folder"),
        ("model", {"max_shard_gb": 0.0}, "it is a positive number of GB"),
        ("model", {"max_shard_gb": float("nan")}, "it is a positive number of GB"),
    ],
)
def test_outputs_that_cannot_be_meant(tmp_path, out, options, message):
    make_run(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        convert(tmp_path, tmp_path / out, ConvertOptions(**options))


@pytest.mark.parametrize("damage", ["truncated", "flipped", "elsewhere", "no checksums", "uncommitted"])
def test_a_damaged_checkpoint_gives_no_file(tmp_path, damage):
    make_run(tmp_path)
    checkpoint = tmp_path / "checkpoints" / "step_00000007"
    victim = checkpoint / "zero" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    if damage == "uncommitted":
        (checkpoint / "manifest.json").unlink()
    elif damage == "no checksums":
        save_without_checksums(victim)
    else:
        data = bytearray(victim.read_bytes())
        master = torch.load(victim)["optimizer_state_dict"]["fp32_flat_groups"][0].numpy().tobytes()
        # Elsewhere: in what converting does not read.
        data[data.index(master) - 1 if damage == "elsewhere" else data.index(master) + 9] ^= 1
        victim.write_bytes(data[:-1] if damage == "truncated" else data)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(CheckpointError) as caught:
        convert(checkpoint, tmp_path / "model.safetensors", ConvertOptions(verify=damage == "elsewhere"))
    assert ("manifest.json is missing" if damage == "uncommitted" else victim.name) in caught.value.line
    assert sorted(tmp_path.iterdir()) == before


def save_without_checksums(path):
    """The same content, of the same size, without torch's checksums: the manifest's are held then."""
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(torch.load(path), path)
    finally:
        torch.serialization.set_crc32_options(True)


@pytest.mark.parametrize("sharded", [False, True])
def test_stopping_half_way_leaves_nothing(tmp_path, sharded):
    make_run(tmp_path)
    before = sorted(tmp_path.iterdir())

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(
            tmp_path,
            tmp_path / ("model" if sharded else "model.safetensors"),
            ConvertOptions(max_shard_gb=600e-9 if sharded else None),
            stop,
        )
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("sharded", [False, True])
def test_killed_half_way_no_output_is_visible_and_the_next_try_succeeds(tmp_path, sharded):
    make_run(tmp_path)
    out, size = tmp_path / ("model" if sharded else "model.safetensors"), 600e-9 if sharded else None
    kill_conversion(tmp_path, out, 0.5, size)
    assert not out.exists()
    report = convert(tmp_path, out, ConvertOptions(max_shard_gb=size))
    assert any("tensors were there of a conversion that was killed" in note for note in report.notes)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoints", "config.py", *beside(out)]
    undisturbed = tmp_path / "other" / out.name
    convert(tmp_path, undisturbed, ConvertOptions(max_shard_gb=size))
    assert contents(undisturbed) == contents(out)


def kill_conversion(checkpoint, out, share, size=None):
    """A conversion that is killed when more than a share of its bytes are written."""
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from piip_scale.checkpoint.convert import ConvertOptions, convert\n"
        f"kill = lambda done, total: os.kill(os.getpid(), signal.SIGKILL) if done > total * {share} else None\n"
        f"convert(Path(sys.argv[1]), Path(sys.argv[2]), ConvertOptions(max_shard_gb={size}), kill)"
    )
    assert preloaded.run(["-c", code, checkpoint, out]).returncode == -signal.SIGKILL


def contents(out):
    paths = sorted(out.iterdir()) if out.is_dir() else [out, out.with_suffix(".manifest.json")]
    return [(path.name, path.read_bytes()) for path in paths]


def test_killed_at_random_points_it_goes_on_and_believes_nothing(tmp_path):
    """Between the kills a byte of what is there is changed, now among the tensors that are done and now elsewhere."""
    make_run(tmp_path, num_weights=12)
    out, whole, draw = tmp_path / "model.safetensors", tmp_path / "whole" / "model.safetensors", random.Random(0)
    convert(tmp_path, whole)
    size = whole.stat().st_size
    for share in sorted(draw.uniform(0.1, 0.9) for _ in range(4)):
        kill_conversion(tmp_path, out, share)
        with (tmp_path / ".model.safetensors.partial").open("r+b") as partial:
            partial.seek(draw.randrange(size // 2, size))
            byte = partial.read(1)
            partial.seek(-1, os.SEEK_CUR)
            partial.write(bytes([byte[0] ^ 1]))
    report = convert(tmp_path, out)
    assert any("tensors were there" in note for note in report.notes)
    assert contents(out) == contents(whole)


def test_what_was_left_of_another_conversion_is_not_taken(tmp_path):
    make_run(tmp_path)
    out = tmp_path / "model.safetensors"
    kill_conversion(tmp_path, out, 0.5)
    file = next((tmp_path / "checkpoints").rglob("*optim_states.pt"))
    os.utime(file, ns=(0, 0))
    report = convert(tmp_path, out)
    assert not any("tensors were there" in note for note in report.notes)


@pytest.mark.parametrize("sharded", [False, True])
def test_an_output_that_cannot_be_replaced_stays_as_it_was(tmp_path, monkeypatch, sharded):
    make_run(tmp_path)
    out, size = tmp_path / ("model" if sharded else "model.safetensors"), 600e-9 if sharded else None
    convert(tmp_path, out, ConvertOptions(max_shard_gb=size))
    held = sorted(out.rglob("*")) if sharded else out.read_bytes()

    def refuse(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(CheckpointError, match=f"cannot write {out}: Input/output error"):
        convert(tmp_path, out, ConvertOptions(dtype="bf16", max_shard_gb=size, overwrite=True))
    assert (sorted(out.rglob("*")) if sharded else out.read_bytes()) == held
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoints", "config.py", *beside(out)]


def test_a_full_disk_is_one_line_and_no_file(tmp_path):
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], check=False).returncode:
        pytest.skip("needs user namespaces to mount a small disk")
    make_run(tmp_path, numel=20_000)
    disk = tmp_path / "disk"
    disk.mkdir()
    code = (
        "import sys; from pathlib import Path; from piip_scale.checkpoint.convert import convert\n"
        "from piip_scale.errors import CheckpointError\n"
        "try: convert(Path(sys.argv[1]), Path(sys.argv[2]))\n"
        "except CheckpointError as error: print(error.line)"
    )
    run = shlex.join(map(str, (sys.executable, "-c", code, tmp_path, disk / "a.safetensors")))
    script = f"mount -t tmpfs -o size=200k none {shlex.quote(str(disk))} && {run}; ls -A {shlex.quote(str(disk))}"
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, timeout=240)
    fix = "free some space on that disk, then start again"
    assert done.stdout.splitlines() == [f"cannot write {disk}/a.safetensors: No space left on device; {fix}"]
    assert done.stderr == ""


def test_memory_is_that_of_a_parameter_and_not_of_the_model(tmp_path):
    """A model of 480 MB in 24 parameters of 20 MB: less than two of them."""
    make_run(tmp_path, numel=5_000_000, num_weights=24, num_ranks=3)
    code = (
        "import sys; from pathlib import Path; from piip_scale.checkpoint.convert import convert\n"
        "from piip_scale.telemetry.memory import peak_memory_bytes as peak; before = peak()\n"
        "convert(Path(sys.argv[1]), Path(sys.argv[2])); print(peak() - before)"
    )
    out = tmp_path / "model.safetensors"
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path, out], capture_output=True, text=True, timeout=240, check=True
    )
    # Buffers of the threads that copy; nothing is mapped.
    assert int(done.stdout) < 40 << 20
    assert out.stat().st_size > 480_000_000


TORCH_DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool])


@settings(max_examples=60, deadline=None)
@given(specs=st.lists(st.tuples(st.lists(st.integers(0, 4), max_size=3).map(tuple), TORCH_DTYPES), max_size=8))
def test_any_tensors_are_read_back_by_the_library(tmp_path_factory, specs):
    path = tmp_path_factory.mktemp("file") / "a.safetensors"
    tensors = {f"ü {i}": (torch.randn(shape) * 3).to(dtype) for i, (shape, dtype) in enumerate(specs)}
    entries = in_file_order(Entry(name, tuple(t.shape), of_torch(t.dtype)) for name, t in tensors.items())
    with SafetensorsWriter(path, entries, {"note": 'with "quotes"\n'}) as writer:
        for entry in reversed(entries):
            data = tensors[entry.name].reshape(-1).view(torch.uint8).numpy().data
            for first in reversed(range(0, len(data), 5)):
                writer.write(entry.name, first, data[first : first + 5])
    assert_equal(load_file(path), tensors)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"note": 'with "quotes"\n'}
