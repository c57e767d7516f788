"""Image folders and lists in shards: what torchvision and webdataset read, and what is refused."""

import json
import os
import shutil

import pytest
import webdataset
from made_sets import make_coco, write_jpeg
from torchvision.datasets import ImageFolder

from piip_scale.data.packing.pack import pack_coco
from piip_scale.data.packing.pack_classes import pack_folders, pack_list, read_class_names
from piip_scale.data.packing.packing import PackOptions
from piip_scale.data.packing.summary import summarise_labels
from piip_scale.data.packing.verify import verify_shards
from piip_scale.data.reading.decoding import decode_labelled
from piip_scale.data.reading.files import json_bytes
from piip_scale.data.reading.raw import RawSample, checksum
from piip_scale.data.reading.shards import ShardSet
from piip_scale.errors import DataError

COUNTS = {"cat": 5, "ape": 9, "big dog": 7}


@pytest.fixture
def folders(tmp_path):
    seed = 0
    for name, count in COUNTS.items():
        for number in range(count):
            write_jpeg(tmp_path / "images" / name / f"{number}.JPEG", 40 + seed % 7, 50, seed)
            seed += 1
    return tmp_path / "images"


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def labels_by_file(shards):
    return {(notes := shards.notes(number))["file_name"]: notes["label"] for number in range(len(shards))}


def test_labels_are_those_of_torchvisions_image_folder(folders, tmp_path):
    pack_folders(folders, tmp_path / "out", how=PackOptions(target_samples=4))
    shards, theirs = ShardSet.open(tmp_path / "out", kind="classification"), ImageFolder(folders)
    assert shards.classes == tuple(theirs.classes)
    assert {str(folders / file): label for file, label in labels_by_file(shards).items()} == dict(theirs.samples)
    assert sorted(shards.image_ids) == list(range(21))
    for number in range(len(shards)):
        image = theirs.loader(folders / shards.notes(number)["file_name"])
        assert tuple(shards.sizes_px[number]) == (image.height, image.width)


def test_webdataset_reads_image_and_label(folders, tmp_path):
    pack_folders(folders, tmp_path / "out", how=PackOptions(target_samples=8))
    urls = sorted(map(str, (tmp_path / "out").glob("*.tar")))
    read = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert len(read) == 21
    for sample in read:
        notes = json.loads(sample["json"])
        assert sample["jpeg"] == (folders / notes["file_name"]).read_bytes()
        assert notes["label"] == sorted(COUNTS).index(notes["file_name"].split("/")[0])


def test_same_bytes_for_any_processes_and_a_second_call_changes_nothing(folders, tmp_path):
    for name, workers in (("a", 1), ("b", 2), ("a", 2)):
        before = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").glob("*")}
        pack_folders(folders, tmp_path / name, how=PackOptions(target_samples=4, workers=workers))
        assert all(path.stat().st_mtime_ns == stamp for path, stamp in before.items())
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_moved_image_is_another_set(folders, tmp_path):
    pack_folders(folders, tmp_path / "out")
    shutil.move(folders / "ape" / "3.JPEG", folders / "cat" / "3b.JPEG")
    with pytest.raises(DataError, match="another input"):
        pack_folders(folders, tmp_path / "out")


def test_every_shard_mixes_the_classes(folders, tmp_path):
    pack_folders(folders, tmp_path / "out", how=PackOptions(target_samples=7))
    shards = ShardSet.open(tmp_path / "out")
    for shard in range(3):
        assert len({shards.notes(number)["label"] for number in shards.numbers_of_shard(shard)}) > 1


def test_a_list_gives_the_labels_it_names(folders, tmp_path):
    lines = [f"{name}/{number}.JPEG {label}" for label, name in enumerate(COUNTS) for number in range(3)]
    (tmp_path / "list.txt").write_text("\n".join(lines) + "\n")
    (tmp_path / "names.txt").write_text("tom\nking kong\nrex\nnobody\n")
    names = read_class_names(tmp_path / "names.txt")
    manifest = pack_list(tmp_path / "list.txt", folders, tmp_path / "out", classes=names)
    shards = ShardSet.open(tmp_path / "out", names, "classification")
    assert labels_by_file(shards) == {line.rpartition(" ")[0]: int(line[-1]) for line in lines}
    assert (manifest.num_samples, manifest.num_annotations) == (9, 9)
    assert summarise_labels(shards).images_of_class == {"tom": 3, "king kong": 3, "rex": 3, "nobody": 0}


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("cat/0.JPEG 3", "line 2 .*label of 0-2"),
        ("cat/0.JPEG -1", "line 2"),
        ("cat/0.JPEG one", "line 2"),
        ("cat/0.JPEG", "line 2"),
        ("cat/99.JPEG 1", "99.JPEG cannot be read"),
        ("cat/1.JPEG 2", "each must be named once"),
    ],
)
def test_a_wrong_line_is_named(folders, tmp_path, line, told):
    (tmp_path / "list.txt").write_text(f"cat/1.JPEG 0\n{line}\n")
    with pytest.raises(DataError, match=told) as caught:
        pack_list(tmp_path / "list.txt", folders, tmp_path / "out", classes=list(COUNTS))
    assert "\n" not in str(caught.value)


def test_a_list_needs_its_files(folders, tmp_path):
    with pytest.raises(DataError, match="must be named"):
        pack_list(tmp_path / "list.txt", folders, tmp_path / "out", classes=())
    with pytest.raises(DataError, match=r"list.txt cannot be read"):
        pack_list(tmp_path / "list.txt", folders, tmp_path / "out", classes=["a"])
    (tmp_path / "names.txt").write_text("a\n\nb\n")
    with pytest.raises(DataError, match=r"line 2 .* is empty"):
        read_class_names(tmp_path / "names.txt")


def test_folders_that_do_not_fit_are_refused(folders, tmp_path):
    with pytest.raises(DataError, match="not found"):
        pack_folders(tmp_path / "absent", tmp_path / "out")
    with pytest.raises(DataError, match=r"no class: got \['cat'\]"):
        pack_folders(folders, tmp_path / "out", classes=("ape", "big dog"))
    (folders / "empty").mkdir()
    with pytest.raises(DataError, match=r"without images: got \['empty'\]"):
        pack_folders(folders, tmp_path / "out")
    named = ("empty", *COUNTS)
    pack_folders(folders, tmp_path / "out", classes=named)
    assert ShardSet.open(tmp_path / "out").classes == named
    (folders / "cat" / ".hidden").write_text("skipped")
    (folders / "cat" / "readme.txt").write_text("hello")
    with pytest.raises(DataError, match=r"readme.txt is no image"):
        pack_folders(folders, tmp_path / "other", classes=named)


def test_a_damaged_image_names_itself(folders, tmp_path):
    content = (folders / "cat" / "2.JPEG").read_bytes()
    (folders / "cat" / "2.JPEG").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"cat/2.JPEG.* cannot be decoded"):
        pack_folders(folders, tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_verify_reads_labels_and_finds_images_of_another_set(folders, tmp_path):
    pack_folders(folders, tmp_path / "out", how=PackOptions(target_samples=9))
    report = verify_shards(tmp_path / "out", workers=1)
    assert (report.kind, report.num_samples, report.num_targets, report.problems) == ("classification", 21, 21, ())
    (tmp_path / "list.txt").write_text("ape/4.JPEG 0\n")
    pack_list(tmp_path / "list.txt", folders, tmp_path / "val", classes=["x"])
    shared = verify_shards(tmp_path / "val", other=tmp_path / "out", workers=1).shared_images
    assert shared == (("000000000000", "000000000004"),)


@pytest.mark.parametrize("label", [3, -1, "cat", None])
def test_a_label_without_a_class_is_a_broken_sample(folders, tmp_path, label):
    pack_folders(folders, tmp_path / "out")
    raw = ShardSet.open(tmp_path / "out").read(0)
    notes = json_bytes(json.loads(raw.notes) | {"label": label})
    with pytest.raises(DataError, match="label of sample"):
        decode_labelled(RawSample(raw.key, raw.image, notes, checksum(raw.image, notes)), 3)


def test_a_set_of_another_kind_is_told(folders, tmp_path):
    pack_folders(folders, tmp_path / "classes")
    pack_coco(*make_coco(tmp_path, 3), tmp_path / "objects")
    for kind, folder in (("detection", "classes"), ("classification", "objects")):
        with pytest.raises(DataError, match=f"this needs a set for {kind}"):
            ShardSet.open(tmp_path / folder, kind=kind)


def test_a_class_folder_of_any_bytes_is_packed(tmp_path, caplog):
    folder = os.fsdecode("caf\u00e9".encode("latin-1"))
    for name in (folder, "plain"):
        write_jpeg(tmp_path / "images" / name / "a.jpg", 20, 30, 1)
    manifest = pack_folders(tmp_path / "images", tmp_path / "set")
    assert [category.name for category in manifest.categories] == ["caf\\xe9", "plain"]
    assert "is written 'caf\\\\xe9'" in caplog.text
    shards = ShardSet.open(tmp_path / "set")
    assert {shards.notes(number)["file_name"] for number in range(2)} == {"caf\\xe9/a.jpg", "plain/a.jpg"}
    assert verify_shards(tmp_path / "set", workers=1).problems == ()


def problem_of(call):
    with pytest.raises(DataError) as caught:
        call()
    return caught.value.line


def test_nothing_beside_the_folders_of_classes_is_passed_over(tmp_path):
    images, out = tmp_path / "images", tmp_path / "set"
    write_jpeg(images / "cat" / "a.jpg", 20, 30, 1)
    (images / "README.txt").write_text("of no class")
    assert pack_folders(images, out).num_samples == 1
    write_jpeg(images / "stray.jpg", 20, 30, 1)
    assert "stray.jpg lies in no class's folder" in problem_of(lambda: pack_folders(images, out))
    write_jpeg(tmp_path / "flat" / "a.jpg", 20, 30, 1)
    assert "a.jpg lies in no class's folder" in problem_of(lambda: pack_folders(tmp_path / "flat", out))
    (images / "stray.jpg").unlink()
    (images / "dog").symlink_to(tmp_path / "moved")
    assert "dog lies in no class's folder" in problem_of(lambda: pack_folders(images, out))
    assert pack_folders(images, tmp_path / "rest", how=PackOptions(skip_broken=True)).num_samples == 1


def test_a_list_names_images_below_its_folder(tmp_path):
    write_jpeg(tmp_path / "images" / "a.jpg", 20, 30, 1)
    write_jpeg(tmp_path / "b.jpg", 20, 30, 1)

    def packed(name):
        (tmp_path / "list.txt").write_text(f"\n{name} 0\n \n")
        out = tmp_path / "set"
        shutil.rmtree(out, ignore_errors=True)
        return pack_list(tmp_path / "list.txt", tmp_path / "images", out, classes=("cat",)).num_samples

    assert packed("a.jpg") == packed(tmp_path / "images" / "a.jpg") == 1
    for name in ("../b.jpg", tmp_path / "b.jpg", "/etc/passwd"):
        assert "it is a path below" in problem_of(lambda name=name: packed(name))


def test_blank_lines_after_the_last_class_are_none(tmp_path):
    (tmp_path / "names.txt").write_text("cat\ndog\n\n \n")
    assert read_class_names(tmp_path / "names.txt") == ("cat", "dog")


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_file_that_links_put_into_two_classes_is_reported(tmp_path, link):
    images = tmp_path / "images"
    write_jpeg(images / "cat" / "a.jpg", 20, 30, 1)
    write_jpeg(images / "dog" / "b.jpg", 20, 30, 2)
    link(images / "cat" / "a.jpg", images / "cat" / "twin.jpg")
    assert pack_folders(images, tmp_path / "set").num_samples == 3
    link(images / "cat" / "a.jpg", images / "dog" / "a.jpg")
    line = problem_of(lambda: pack_folders(images, tmp_path / "other"))
    assert "images cat/a.jpg, cat/twin.jpg, dog/a.jpg are one file; it has one class" in line
    assert (
        pack_folders(images, tmp_path / "rest", classes=("cat", "dog"), how=PackOptions(skip_broken=True)).num_samples
        == 1
    )
