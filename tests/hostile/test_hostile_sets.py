"""Sets that somebody else wrote or serves: manifests, indexes, members, annotations, names; each one clear line."""

import hashlib
import json
import math
import os
import shlex
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from piip_scale.config.run import CacheConfig
from piip_scale.data.augment.geometry import Geometry, Window
from piip_scale.data.augment.transforms import apply_geometry
from piip_scale.data.packing.pack import pack_coco
from piip_scale.data.reading.cache import Entry, FileCache
from piip_scale.data.reading.decoding import decode_sample
from piip_scale.data.reading.manifest import Manifest, ShardIndex, parsed
from piip_scale.data.reading.raw import RawSample, checked_masks, checksum, parse_notes
from piip_scale.data.reading.shards import ShardSet
from piip_scale.data.reading.sources import NEVER, ObjectSource, PipeSource
from piip_scale.errors import DataError

SHARD = "shard-000000"
LONG = "9" * 5000
# What no field of a number, and what no field of a name takes.
NUMBERS = [-1, 2**63, 10**30, math.nan, math.inf, -math.inf, 1.5, "7", None, [], True]
NAMES = ["", "a\nb", "a\x1b[2Jb", "a\0b", "\ud800", "\u202egnp.exe", "x" * 501, 3, None, ["a"]]
PATHS = [
    "../../.ssh/id_rsa",
    "/etc/passwd",
    "shard-000000.tar/../../x",
    "",
    ".",
    "~",
    "shard-0.tar",
    "a" * 64,
    "\0",
    None,
]
quick = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "images").mkdir()
    for number in range(3):
        PIL.Image.new("RGB", (32, 24), (number, 90, 200)).save(folder / "images" / f"{number}.png")
    notes = [
        {"id": n, "image_id": n, "category_id": 1, "bbox": [2, 3, 9, 8], "segmentation": [[2, 3, 11, 3, 11, 11, 2, 11]]}
        for n in range(3)
    ]
    images = [{"id": n, "file_name": f"{n}.png", "height": 24, "width": 32} for n in range(3)]
    root = {"images": images, "annotations": notes, "categories": [{"id": 1, "name": "cat"}]}
    (folder / "ann.json").write_text(json.dumps(root))
    pack_coco(folder / "ann.json", folder / "images", folder / "set")
    return folder / "set"


@pytest.fixture
def altered(packed, tmp_path):
    """Writes the set anew with other values; an index keeps its checksum in the manifest, unless that is the matter."""

    def write(manifest=None, index=None, *, keep_checksum=False):
        folder = tmp_path / "set"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(packed, folder)
        root = json.loads((folder / "manifest.json").read_text()) | (manifest or {})
        if index is not None:
            columns = json.loads((folder / f"{SHARD}.index.json").read_text()) | index
            content = json.dumps(columns).encode()
            (folder / f"{SHARD}.index.json").write_bytes(content)
            if not keep_checksum:
                root["shards"][0]["index_sha256"] = hashlib.sha256(content).hexdigest()
        (folder / "manifest.json").write_text(json.dumps(root))
        return folder

    return write


def refused(act, match=""):
    with pytest.raises(DataError, match=match) as caught:
        act()
    line = caught.value.line
    assert line.isprintable()
    line.encode()
    assert len(line) < 2000, line
    return line


def taken_or_refused(act):
    try:
        act()
    except DataError as error:
        line = error.line
    else:
        return ""
    assert line.isprintable()
    return line


def shard_with(packed, **values):
    return [json.loads((packed / "manifest.json").read_text())["shards"][0] | values]


@pytest.mark.parametrize("field", ["num_samples", "size_bytes"])
@pytest.mark.parametrize("value", NUMBERS)
def test_numbers_of_a_shard_are_counts(packed, altered, field, value):
    folder = altered({"shards": shard_with(packed, **{field: value})})
    refused(lambda: ShardSet.open(folder))


@pytest.mark.parametrize("field", ["name", "sha256", "index_sha256"])
@pytest.mark.parametrize("value", PATHS)
def test_what_becomes_a_path_has_one_shape(packed, altered, field, value):
    if field != "name" and value == "a" * 64:
        return
    folder = altered({"shards": shard_with(packed, **{field: value})})
    refused(lambda: ShardSet.open(folder), rf"manifest.json is damaged: got .shards\.0\.{field}")


@pytest.mark.parametrize("name", NAMES)
def test_names_of_classes_are_text_of_one_line(altered, name):
    folder = altered({"categories": [{"id": 1, "name": name}]})
    refused(lambda: ShardSet.open(folder))


@pytest.mark.parametrize(
    "name", ["[red]cat[/red]", "%s", "{0.__class__}", "$(reboot)", "../..", "猫", "a" * 500, "e\u0301"]
)
def test_names_that_only_look_like_something_else_are_names(altered, name):
    assert ShardSet.open(altered({"categories": [{"id": 1, "name": name}]})).classes == (name,)


@pytest.mark.parametrize(
    "change",
    [
        {"num_samples": 4},
        {"shards": []},
        {"categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]},
        {"categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "a"}]},
        {"format_version": 99},
        {"kind": "a kind"},
        {"more": 1},
        {"categories": [{"id": 10**40, "name": "a"}]},
    ],
)
def test_manifests_that_do_not_add_up_are_refused(altered, change):
    refused(lambda: ShardSet.open(altered(change)))


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe", b"[]", b"null", b"1" * 9000, b"[" * 100_000, b'{"a":' * 5000, b"<html>"]
)
def test_files_that_are_no_manifest_or_index_are_refused(altered, content):
    folder = altered()
    for name in (f"{SHARD}.index.json", "manifest.json"):
        (folder / name).write_bytes(content)
        refused(lambda: ShardSet.open(folder))


COLUMNS = [
    "image_offsets",
    "image_bytes",
    "notes_offsets",
    "notes_bytes",
    "crc32s",
    "heights_px",
    "widths_px",
    "image_ids",
]


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("value", NUMBERS)
def test_columns_of_an_index_are_bounded(altered, column, value):
    folder = altered(index={column: [0 if column != "heights_px" else 24, 1, value]})
    refused(lambda: ShardSet.open(folder), "index.json")


@pytest.mark.parametrize(
    "index",
    [
        {"image_offsets": [0, 0, 10**9]},
        {"image_bytes": [1, 1, 2**61]},
        {"notes_offsets": [0, 0, 2**62], "notes_bytes": [0, 0, 2**62]},
        {"image_offsets": [0, 0]},
        {"image_offsets": []},
        {"orientations": [1, 2]},
        {"orientations": [1, 2, 9]},
        {"orientations": [0, 1, 1]},
        {"map_offsets": [0, 0, 10**9], "map_bytes": [1, 1, 1]},
        {"keys": ["a", "b", "c\nd"]},
        {"keys": ["a", "b", 3]},
        {"shard_bytes": 2**50},
    ],
)
def test_an_index_stays_inside_its_shard(altered, index):
    refused(lambda: ShardSet.open(altered(index=index)), "index")


def test_an_index_of_another_set_is_refused(altered):
    folder = altered(index={"image_ids": [5, 6, 7]}, keep_checksum=True)
    refused(lambda: ShardSet.open(folder), "is not the one that was packed")


def test_images_larger_than_the_limit_are_refused_at_the_door(altered):
    folder = altered(index={"heights_px": [24, 24, 60_000], "widths_px": [32, 32, 60_000]})
    refused(lambda: ShardSet.open(folder), r"60000 x 60000 px.*data\.max_pixels")
    assert len(ShardSet.open(folder, max_pixels=2**32)) == 3


def test_a_file_larger_than_its_index_says_is_not_decoded(altered):
    shards = ShardSet.open(altered(index={"heights_px": [2, 24, 24]}))
    refused(lambda: decode_sample(shards.read(0), {1: 0}, has_masks=True), "32 x 24 px; at most 64 pixels")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@quick
@given(data=st.data(), value=json_values)
def test_any_value_in_any_field_is_taken_or_refused_in_one_line(packed, data, value):
    for name, kind in (("manifest.json", Manifest), (f"{SHARD}.index.json", ShardIndex)):
        root = json.loads((packed / name).read_text())
        field = data.draw(st.sampled_from(sorted(root)))
        content = json.dumps(root | {field: value}).encode()
        taken_or_refused(lambda content=content, kind=kind: parsed(content, kind, "a file"))


NOTES = {"image_id": 1, "file_name": "a.png", "height": 24, "width": 32}
OBJECT = {"id": 1, "category_id": 1, "bbox": [2, 3, 9, 8], "area": 72.0, "iscrowd": 0}


def raw_of(packed, notes):
    image = ShardSet.open(packed).read(0).image
    content = notes if isinstance(notes, bytes) else json.dumps(notes).encode()
    return RawSample("a", image, content, checksum(image, content), size_px=(24, 32))


@pytest.mark.parametrize(
    "notes", [b"", b"null", b"[]", b"3", b"{}", b"[" * 200_000, LONG.encode(), b"\xff", b'{"image_id":']
)
def test_annotations_that_are_none_break_their_sample_alone(packed, notes):
    refused(lambda: decode_sample(raw_of(packed, notes), {1: 0}, has_masks=False), "annotations of sample a")


@quick
@given(field=st.sampled_from(sorted(OBJECT | NOTES | {"segmentation": 0, "label": 0})), value=json_values)
def test_any_annotation_is_decoded_or_refused_in_one_line(packed, field, value):
    square = [[2.0, 3, 11, 3, 11, 11, 2, 11]]
    annotation = OBJECT | {"segmentation": square} | ({field: value} if field in (*OBJECT, "segmentation") else {})
    notes = NOTES | {"annotations": [annotation]} | ({field: value} if field in (*NOTES, "label") else {})
    taken_or_refused(lambda: decode_sample(raw_of(packed, notes), {1: 0}, has_masks=True))


@pytest.mark.parametrize(
    "mask",
    [
        {"size": [24, 32], "counts": "1"},
        {"size": [24, 32], "counts": "P" * 400},
        {"size": [24, 32], "counts": "\x00\xff"},
        {"size": [60_000, 60_000], "counts": "1"},
        {"size": [24, 32], "counts": 7},
        {"size": "ab", "counts": "1"},
        {"counts": "1"},
        [[0, 0, 1e300, 0, 0, 1e300]],
        [[0, 0, math.nan, 0, 0, 1]],
        [[0, 0, "x", 0, 0, 1]],
        [[0, 0, [1], 0, 0, 1]],
        [[1, 2, 3, 4, 5, 6, 7]],
        [[0, 0]],
        ["abcdef"],
        "abc",
        None,
        7,
    ],
)
def test_masks_are_checked_before_foreign_code_sees_them(packed, mask):
    notes = NOTES | {"annotations": [OBJECT | {"segmentation": mask}]}
    raw = raw_of(packed, notes)

    def train():
        sample = decode_sample(raw, {1: 0}, has_masks=True)
        apply_geometry(sample, Geometry(Window(0, 0, 32, 24), (24, 32)), polygons=True)

    refused(train)
    refused(lambda: checked_masks(parse_notes(raw), "a"))


def test_annotations_must_be_those_of_index_and_manifest(altered):
    shards = ShardSet.open(altered(index={"image_ids": [5, 1, 2]}))
    refused(lambda: shards.notes(0), "the index says 5")
    shards = ShardSet.open(altered({"categories": [{"id": 9, "name": "cat"}]}))
    refused(lambda: shards.notes(0), "category 1, and the manifest has none")
    refused(shards.coco_ground_truth, "category 1")


@pytest.mark.parametrize("sha256", ["../keep", "/etc/passwd", "", "A" * 64, "0" * 63, "0" * 64 + "\n"])
def test_the_cache_takes_no_path_for_a_checksum(sha256):
    refused(lambda: Entry(sha256, 3, "shard"), "64 hexadecimal digits")


def test_the_cache_removes_and_empties_only_what_it_made(tmp_path):
    folder, victim = tmp_path / "cache", tmp_path / "victim"
    folder.mkdir()
    victim.write_bytes(b"of the user")
    entries = [Entry(f"{n:064x}", 1000, f"shard {n}") for n in range(4)]
    # Another tool's files of the same folder are named by their bare checksums.
    (folder / entries[0].sha256).write_bytes(b"of another tool" * 100)
    (folder / f"{entries[1].sha256}.part").symlink_to(victim)
    (folder / entries[2].file_name).symlink_to(victim)
    (folder / f"{7:064x}.cached").mkdir()
    cache = FileCache(folder, 1500)
    for number, entry in enumerate(entries):
        line = taken_or_refused(lambda entry=entry: cache.open(entry, lambda file: file.write(b"x" * 1000)).close())
        assert ("symbolic links" in line) == (number in (1, 2))
    assert victim.read_bytes() == b"of the user"
    assert (folder / entries[0].sha256).stat().st_size == 1500
    assert (folder / f"{7:064x}.cached").is_dir()


def test_names_of_a_sets_files_reach_a_command_in_any_quotes(packed):
    for quoted in (f"{packed}/{{name}}", f"'{packed}/{{name}}'", f'"{packed}/{{name}}"'):
        content = b"".join(PipeSource(f"pipe:cat {quoted}", 300.0).stream("manifest.json", 0, None, NEVER))
        assert content == (packed / "manifest.json").read_bytes()


@pytest.mark.parametrize(
    "options", [{"headers": "x"}, {"client_kwargs": 7}, {"client_kwargs": {"no_such": 1}}, "text", {"block_size": "x"}]
)
def test_options_of_the_environment_are_refused_or_taken_in_one_line(monkeypatch, options):
    import fsspec

    monkeypatch.setitem(fsspec.config.conf, "http", options)
    line = taken_or_refused(lambda: ObjectSource("http://127.0.0.1:9/set", 1.0))
    assert not line or "FSSPEC_" in line


def test_a_served_set_removes_no_file_of_the_users(packed, altered, tmp_path):
    """The manifest of the report: checksums that are paths, of a set behind a command."""
    victim = tmp_path / "thesis.tex"
    victim.write_text("years of work")
    cache = CacheConfig(folder=str(tmp_path / "cache"), retries=0)
    for field in ("sha256", "index_sha256", "name"):
        for path in (str(victim), "../thesis.tex"):
            folder = altered({"shards": shard_with(packed, **{field: path})})
            refused(lambda folder=folder: ShardSet.open(f"pipe:cat {shlex.quote(str(folder))}/{{name}}", cache=cache))
    assert victim.read_text() == "years of work"
    assert not list((tmp_path / "cache").glob("*.part"))


def test_sizes_of_exabytes_do_not_fit_into_the_cache(packed, altered, tmp_path):
    folder = altered({"shards": shard_with(packed, size_bytes=2**61)}, index={"shard_bytes": 2**61})
    cache = CacheConfig(folder=str(tmp_path / "cache"), retries=0)
    shards = ShardSet.open(f"pipe:cat {shlex.quote(str(folder))}/{{name}}", cache=cache)
    refused(lambda: shards.read(0), r"GiB does not fit into the cache.*limit_gib")
    assert np.array_equal(shards.image_ids, [0, 1, 2])
    assert not [path for path in Path(tmp_path / "cache").iterdir() if path.stat().st_size > 10**6]
    assert os.path.isdir(tmp_path / "cache")
