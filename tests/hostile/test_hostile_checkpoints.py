"""Checkpoints, descriptions and weights from somebody who means harm: one line, no path left, no code run, no hang."""

import json
import os
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from zero_files import write_checkpoint

from piip_scale.checkpoint.averages import AVERAGE, UPDATES
from piip_scale.checkpoint.convert import convert
from piip_scale.checkpoint.origin import STATE_FILE
from piip_scale.checkpoint.store import MANIFEST, CheckpointStore, resolve_checkpoint
from piip_scale.checkpoint.swapped import SWAPPED
from piip_scale.checkpoint.zero_reader import ZeroCheckpoint
from piip_scale.engine.resuming import read_state
from piip_scale.errors import CheckpointError, ModelError, PiipError
from piip_scale.run.heartbeat import read_beats
from piip_scale.tasks.weights import SafetensorsWeights, load_weights

ENTRY = {"bytes": 4, "crc32": "0" * 8}
DEEP = "[" * 100_000


def one_line(error):
    assert isinstance(error, PiipError)
    assert "\n" not in error.line
    return True


@pytest.fixture
def committed(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", keep=1)
    (store.begin(3) / "data").write_bytes(b"1234")
    (tmp_path / "outside").write_bytes(b"1234")
    return store.commit(3)


MANIFESTS = [
    *(
        {"files": {name: ENTRY}}
        for name in ("../../outside", "/etc/hostname", "a//b", "./data", "", "a\nb", "\x1b[31m")
    ),
    *({"files": {"data": ENTRY | wrong}} for wrong in ({"bytes": "4"}, {"bytes": -1}, {"bytes": True})),
    *({"files": {"data": ENTRY | wrong}} for wrong in ({"crc32": "[red]"}, {"crc32": 7}, {"crc32": None})),
    *({"files": files} for files in ([], None, "data", {"data": []})),
    *({"step": step} for step in ("3", -1, 1.5, True, None, 10**30)),
]


@pytest.mark.parametrize("changes", MANIFESTS)
def test_manifests(committed, changes):
    path = committed / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(CheckpointError) as caught:
        resolve_checkpoint(committed)
    assert one_line(caught.value)
    assert CheckpointStore(committed.parent, keep=1).latest() is None


@pytest.mark.parametrize("text", ["", "\x00", "3", "[]", "null", DEEP, '{"format": 1}', '{"format": {}}'])
def test_manifests_that_are_none(committed, text):
    (committed / MANIFEST).write_text(text)
    with pytest.raises(CheckpointError) as caught:
        resolve_checkpoint(committed)
    assert one_line(caught.value)


GOOD = {
    "format": 2,
    "step": 3,
    "num_ranks": 2,
    "stage": 3,
    "precision": "fp32",
    "images_per_step": 8,
    "steps_per_epoch": 4,
    "shapes": {"a": [2]},
    "groups": [["a"]],
    "versions": {"torch": "2"},
    "config": {"train": {"seed": 0}, "data": {"num_streams": 2}},
}


@pytest.mark.parametrize(
    "changes",
    [
        *({"step": step} for step in ("3", -1, None, True)),
        *({"images_per_step": images} for images in ("8", [], 0.5)),
        *({"config": config} for config in ({}, [], None, {"train": 3, "data": 3})),
        *({"groups": groups} for groups in (3, [3], [[3]])),
        *({"shapes": shapes} for shapes in ([], {"a": 3}, {"a": ["x"]})),
        *({"versions": versions} for versions in ([], {"torch": 2})),
        {"__class__": "os.system"},
    ],
)
def test_descriptions(tmp_path, changes):
    (tmp_path / STATE_FILE).write_text(json.dumps(GOOD))
    assert read_state(tmp_path).step == 3
    (tmp_path / STATE_FILE).write_text(json.dumps(GOOD | changes))
    with pytest.raises(CheckpointError) as caught:
        read_state(tmp_path)
    assert one_line(caught.value)


@pytest.mark.parametrize("text", ["", "null", "[]", DEEP, "\x00"])
def test_descriptions_that_are_none(tmp_path, text):
    (tmp_path / STATE_FILE).write_text(text)
    with pytest.raises(CheckpointError) as caught:
        read_state(tmp_path)
    assert one_line(caught.value)


def written(folder, stage=3):
    torch.manual_seed(0)
    groups = [{"a.weight": torch.randn(3, 2), "a.bias": torch.randn(3)}]
    write_checkpoint(folder, stage, 2, groups, {"f": torch.randn(3)}, {"table": torch.arange(3)})
    return folder


def model_file(folder):
    return next(iter(sorted(folder.glob("*model_states.pt"))))


def optimizer_file(folder):
    return next(iter(sorted(folder.glob("*rank_1_*optim_states.pt"))))


def nested(content, keys, value):
    for key in keys[:-1]:
        content = content[key]
    content[keys[-1]] = value


FLATS = ("optimizer_state_dict", "fp32_flat_groups")
BOMB = torch.zeros(1).expand(1 << 40)
OF_MODEL = [
    *((("module",), value) for value in ([], 3, None, torch.zeros(2), {"a.weight": 3})),
    *((("module", name), torch.zeros(1)) for name in ("__metadata__", "x\ny", "", "\x1b[2J", "[red]\udcff")),
    (("module", "extra"), BOMB),
    (("module", "extra"), torch.zeros(2).to_sparse()),
    *((("param_shapes",), value) for value in (3, {}, [3], [{"a.weight": (-3, -2)}], [{"a.weight": ("x",)}])),
    *((("param_shapes", 0, "a.weight"), value) for value in ((1 << 40, 1 << 40), (True, 6), 6, None)),
    *((("frozen_param_shapes",), value) for value in (3, [1], {"f": 3}, {"f": torch.Size([99])})),
    *((("frozen_param_fragments", "f"), value) for value in (3, BOMB, "x")),
    *((("dp_world_size",), value) for value in ("x", None, [], 1 << 80)),
    *((("mp_world_size",), value) for value in ("x", None, 2)),
    *((("buffer_names",), value) for value in (3, [[]], [{}])),
]
OF_OPTIMIZER = [
    *((("optimizer_state_dict",), value) for value in (3, [], None)),
    *((FLATS, value) for value in (3, [], [3], ["x"])),
    *(((*FLATS, 0), value) for value in (torch.zeros(1), BOMB, torch.zeros(0), torch.zeros(9).int())),
    *(((SWAPPED,), [[4, stem]]) for stem in ("../../../outside", "/etc/hostname", "offloaded_tensors/rank00/../x", 3)),
    *(((SWAPPED,), value) for value in (3, [3], [[1 << 60, "offloaded_tensors/rank00/0"]], ["xy"])),
]


@pytest.mark.parametrize(
    ("file", "keys", "value"),
    [*((model_file, *case) for case in OF_MODEL), *((optimizer_file, *case) for case in OF_OPTIMIZER)],
)
def test_pickles_of_plain_values(tmp_path, file, keys, value):
    victim = file(written(tmp_path))
    content = torch.load(victim)
    nested(content, keys, value)
    torch.save(content, victim)
    read = read_or_one_line(tmp_path)
    if read is not None:
        # What nobody reads may be anything: then all of the rest is right.
        truth = dict(ZeroCheckpoint(written(tmp_path / "truth")))
        assert all(torch.equal(read[name], value) for name, value in truth.items())


def read_or_one_line(folder):
    """All tensors of a checkpoint; ``None`` where it was refused, in one line."""
    refused = None
    try:
        return dict(ZeroCheckpoint(folder))
    except PiipError as error:
        refused = error
    assert one_line(refused)
    return None


class Evil:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("name", ["model", "optimizer", AVERAGE])
def test_no_code_runs(tmp_path, name):
    folder = written(tmp_path / "checkpoint" / "zero")
    average = tmp_path / "checkpoint" / AVERAGE / "rank_00000.pt"
    victim = {"model": model_file(folder), "optimizer": optimizer_file(folder), AVERAGE: average}[name]
    average.parent.mkdir()
    torch.save({"module": Evil(tmp_path / "ran")}, victim)
    for other in {average, average.with_name("rank_00001.pt")} - {victim}:
        torch.save({AVERAGE: [], UPDATES: 1}, other)
    with pytest.raises(CheckpointError, match="could run code") as caught:
        dict(ZeroCheckpoint(tmp_path / "checkpoint", averaged=name == AVERAGE))
    assert one_line(caught.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("updates", ["3", -1, None, True, torch.zeros(1)])
def test_averages(tmp_path, updates):
    written(tmp_path / "zero")
    (tmp_path / AVERAGE).mkdir()
    for rank in range(2):
        torch.save({AVERAGE: [torch.zeros(9)], UPDATES: updates}, tmp_path / AVERAGE / f"rank_{rank:05d}.pt")
    with pytest.raises(CheckpointError) as caught:
        ZeroCheckpoint(tmp_path, averaged=True)
    assert one_line(caught.value)


@settings(max_examples=25, deadline=None)
@given(where=st.floats(0, 1), noise=st.binary(min_size=1, max_size=40), of_model=st.booleans())
def test_noise_in_a_file_is_one_line_or_other_numbers(tmp_path_factory, where, noise, of_model):
    folder = written(tmp_path_factory.mktemp("noise"))
    victim = model_file(folder) if of_model else optimizer_file(folder)
    content = bytearray(victim.read_bytes())
    begin = int(where * (len(content) - len(noise)))
    content[begin : begin + len(noise)] = noise
    victim.write_bytes(content)
    read_or_one_line(folder)


@pytest.mark.parametrize("tag", ["../../outside", "/etc", "a\x00b", "\n\n", "."])
def test_latest_of_a_foreign_folder_is_no_path(tmp_path, tag):
    written(tmp_path / "run" / "global_step1")
    written(tmp_path / "run" / "global_step2")
    written(tmp_path / "outside")
    (tmp_path / "run" / "latest").write_text(tag)
    with pytest.raises(CheckpointError, match="holds 2 DeepSpeed checkpoints: global_step1, global_step2"):
        convert(tmp_path / "run", tmp_path / "out.safetensors")
    (tmp_path / "run" / "latest").write_text("global_step2\n")
    convert(tmp_path / "run", tmp_path / "out.safetensors")


def header(content, length=None):
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text


FLOAT = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HEADERS = {
    "empty": b"",
    "endless": header({}, 1 << 62),
    "longer than the file": header({"weight": FLOAT}),
    "no JSON": header(b"\xff" * 40),
    "deep": header(DEEP.encode()),
    "negative": header({"weight": FLOAT | {"data_offsets": [-8, 8]}}) + bytes(8),
    "overlapping": header({"weight": FLOAT, "bias": FLOAT}) + bytes(8),
    "overflowing": header({"weight": FLOAT | {"shape": [1 << 62, 1 << 62]}}) + bytes(8),
    "unknown dtype": header({"weight": FLOAT | {"dtype": "PICKLE"}}) + bytes(8),
    "integers": header({"weight": FLOAT | {"dtype": "I32"}, "b\nias": FLOAT}) + bytes(8),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_safetensors_headers(tmp_path, kind):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(HEADERS[kind])
    model = nn.Linear(2, 1, bias=False)
    before = model.weight.detach().clone()
    with pytest.raises(ModelError) as caught:
        load_weights(model, SafetensorsWeights(path))
    assert one_line(caught.value)
    assert torch.equal(model.weight, before)


def test_names_in_a_weights_file_are_text(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({"[bold red]x[/]{0.__class__}%s": torch.zeros(2)}, path)
    with pytest.raises(ModelError, match=r"\[bold red\]x\[/\]\{0\.__class__\}%s"):
        load_weights(nn.Linear(2, 1), SafetensorsWeights(path))


@pytest.mark.parametrize(
    "text", ["", "3", "[]", "{}", DEEP, '{"rank": "x", "number": 0}', json.dumps(dict.fromkeys(("rank", "pid"), "x"))]
)
def test_heartbeats_that_are_none_are_as_good_as_none(tmp_path, text):
    (tmp_path / "rank_0.json").write_text(text)
    assert list(read_beats(tmp_path, 0.0)) == []


def test_a_heartbeat_of_other_types_is_as_good_as_none(tmp_path):
    names = ("rank", "number", "collectives", "phase", "step", "waiting_s", "unix_time_s", "host", "pid")
    (tmp_path / "rank_0.json").write_text(json.dumps(dict.fromkeys(names, "x")))
    assert list(read_beats(tmp_path, 0.0)) == []
