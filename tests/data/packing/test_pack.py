"""Packing: readable by others, the same bytes for the same input, whole or absent whatever happens."""

import json
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import PIL.Image
import psutil
import pytest
import simplejpeg
import webdataset
from made_sets import SHARED, make_coco

from piip_scale.data.images import decode_image
from piip_scale.data.packing.pack import pack_coco
from piip_scale.data.reading.decoding import decode_sample
from piip_scale.data.reading.files import sha256_of_file
from piip_scale.data.reading.raw import parse_notes
from piip_scale.data.reading.shards import ShardSet
from piip_scale.errors import DataError

PACK = """
import os, resource, signal, sys
from piip_scale.data.packing.pack import pack_coco
{setup}
pack_coco(sys.argv[1], sys.argv[2], sys.argv[3], target_samples=4, workers={workers}, on_progress={progress})
"""


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def run_pack(source, out, *, setup="", workers=1, progress="None"):
    script = PACK.format(setup=setup, workers=workers, progress=progress)
    return subprocess.Popen([sys.executable, "-c", script, *map(str, source), str(out)], stderr=subprocess.PIPE)


def test_same_bytes_whatever_the_number_of_processes(tmp_path):
    source = make_coco(tmp_path, 14)
    progress = []
    manifest = pack_coco(
        *source, tmp_path / "a", target_samples=4, workers=1, on_progress=lambda *p: progress.append(p)
    )
    pack_coco(*source, tmp_path / "b", target_samples=4, workers=2)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert [shard.num_samples for shard in manifest.shards] == [4, 4, 4, 2]
    assert progress == [(done, 14) for done in range(1, 15)]
    for shard in manifest.shards:
        assert sha256_of_file(tmp_path / "a" / shard.name) == shard.sha256


def test_manifest_tells_how_it_was_made(tmp_path):
    annotations, images = make_coco(tmp_path, 8)
    root = json.loads(annotations.read_text())
    root["annotations"][0]["bbox"] = [60, 40, 30, 30]
    root["annotations"][1]["bbox"] = [90, 40, 30, 30]
    annotations.write_text(json.dumps(root))
    manifest = pack_coco(annotations, images, tmp_path / "out", clip_boxes=True, boxes_only=True)
    made = ShardSet.open(tmp_path / "out").manifest.made_with
    assert made["annotations_sha256"] == sha256_of_file(annotations)
    assert (made["annotations"], made["clip_boxes"], made["num_clipped"], made["num_dropped"]) == (
        "ann.json",
        True,
        1,
        1,
    )
    assert manifest.num_annotations == len(root["annotations"]) - 1


def test_renamed_classes_are_another_set(tmp_path):
    annotations, images = make_coco(tmp_path, 5)
    pack_coco(annotations, images, tmp_path / "out")
    annotations.write_text(annotations.read_text().replace('"name": "a"', '"name": "c"'))
    with pytest.raises(DataError, match="another input"):
        pack_coco(annotations, images, tmp_path / "out")
    pack_coco(annotations, images, tmp_path / "out", overwrite=True)
    assert ShardSet.open(tmp_path / "out").classes == ("b", "c")


def test_images_are_compressed_again_only_when_asked_and_only_to_be_smaller(tmp_path):
    annotations, images = make_coco(tmp_path, 6)
    pixels = decode_image((images / "1.jpg").read_bytes(), "1")
    small = simplejpeg.encode_jpeg(pixels, quality=5)
    (images / "1.jpg").write_bytes(small)
    root = json.loads(annotations.read_text())
    PIL.Image.fromarray(decode_image((images / "2.jpg").read_bytes(), "2")).save(images / "2.png")
    root["images"][2]["file_name"] = "2.png"
    annotations.write_text(json.dumps(root))
    pack_coco(annotations, images, tmp_path / "a", jpeg_quality=40, workers=1)
    pack_coco(annotations, images, tmp_path / "b", jpeg_quality=40, workers=2, target_samples=None)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    shards = ShardSet.open(tmp_path / "a")
    assert shards.manifest.made_with["jpeg_quality"] == 40
    assert shards.read(1).image == small
    for number in (0, 2):
        original = next(images.glob(f"{number}.{'png' if number else 'jpg'}")).read_bytes()
        stored = shards.read(number).image
        assert len(stored) < len(original)
        again = simplejpeg.encode_jpeg(decode_image(original, "x"), quality=40, colorsubsampling="420")
        assert np.array_equal(decode_image(stored, "x"), decode_image(again, "x"))
    with tarfile.open(tmp_path / "a" / "shard-000000.tar") as tar:
        assert {Path(name).suffix for name in tar.getnames()} == {".jpg", ".json"}
    with pytest.raises(DataError, match="other options"):
        pack_coco(annotations, images, tmp_path / "a", jpeg_quality=41)
    with pytest.raises(DataError, match="it is 1 to 100"):
        pack_coco(annotations, images, tmp_path / "c", jpeg_quality=0)


def test_packing_that_is_killed_while_a_file_takes_its_name_goes_on(tmp_path, monkeypatch):
    source, rename = make_coco(tmp_path, 6), os.replace
    whole = contents_of_packed(source, tmp_path / "whole")
    num_files = len(list((tmp_path / "whole").iterdir()))
    for last in range(num_files):
        out, done = tmp_path / f"killed {last}", []

        def killed(*names, last=last, done=done):
            if len(done) == last:
                raise KeyboardInterrupt
            done.append(names)
            rename(*names)

        monkeypatch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            pack_coco(*source, out, target_samples=2, workers=1)
        monkeypatch.setattr(os, "replace", rename)
        assert contents_of_packed(source, out) == whole


def contents_of_packed(source, out):
    pack_coco(*source, out, target_samples=2, workers=1)
    return contents(out)


def test_two_packers_do_not_share_a_folder(tmp_path):
    source, out = make_coco(tmp_path, 12), tmp_path / "out"
    report = "lambda done, total: (print(done, file=sys.stderr, flush=True), __import__('time').sleep(3600))"
    process = run_pack(source, out, workers=2, progress=report)
    process.stderr.readline()
    with pytest.raises(DataError, match="another process packs into"):
        pack_coco(*source, out, target_samples=4)
    process.kill()
    process.wait()
    pack_coco(*source, out, target_samples=4)
    assert not list(out.glob(".*"))
    out.chmod(0o555)
    assert pack_coco(*source, out, target_samples=4).num_samples == 12
    out.chmod(0o755)


def test_target_size_bounds_the_shards(tmp_path):
    source = make_coco(tmp_path, 14)
    manifest = pack_coco(*source, tmp_path / "a", target_mb=0.02)
    assert len(manifest.shards) > 2
    # tar ends with zero blocks up to a record of 10,240 bytes.
    assert max(shard.size_bytes for shard in manifest.shards) <= 20_000 + tarfile.RECORDSIZE
    with pytest.raises(DataError, match="above 0"):
        pack_coco(*source, tmp_path / "c", target_mb=0)
    with pytest.raises(DataError, match="above 0"):
        pack_coco(*source, tmp_path / "c", target_mb=float("nan"))


def test_tar_and_webdataset_read_what_the_index_says(tmp_path):
    annotations, images = make_coco(tmp_path, 9)
    pack_coco(annotations, images, tmp_path / "out", target_samples=5)
    shards = ShardSet.open(tmp_path / "out")
    urls = [str(path) for path in sorted((tmp_path / "out").glob("*.tar"))]
    streamed = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [sample["__key__"] for sample in streamed] == list(shards.keys)
    number = 0
    for url in urls:
        with tarfile.open(url) as tar:
            members = tar.getmembers()
            for image, notes in zip(members[::2], members[1::2], strict=True):
                raw = shards.read(number)
                assert raw.image == tar.extractfile(image).read() == streamed[number]["jpg"]
                assert raw.image == (images / f"{number}.jpg").read_bytes()
                assert raw.notes == tar.extractfile(notes).read() == streamed[number]["json"]
                number += 1
    assert number == len(shards) == 9


def test_ground_truth_and_samples_are_those_of_the_file(tmp_path):
    annotations, images = make_coco(tmp_path, 8)
    pack_coco(annotations, images, tmp_path / "out", target_samples=3)
    shards = ShardSet.open(tmp_path / "out", classes=("b", "a"))
    root = json.loads(annotations.read_text())
    truth = shards.coco_ground_truth()
    assert all(shards.notes(number) == parse_notes(shards.read(number)) for number in range(len(shards)))
    assert truth["images"] == root["images"]
    assert truth["annotations"] == root["annotations"]
    assert truth["categories"] == sorted(root["categories"], key=lambda category: category["id"])
    assert shards.sizes_px.tolist() == [[i["height"], i["width"]] for i in root["images"]]
    sample = decode_sample(shards.read(3), shards.label_of_category, has_masks=True)
    notes = [note for note in root["annotations"] if note["image_id"] == 103]
    assert sample.labels.tolist() == [0, 0, 0]
    expected = np.array([note["bbox"] for note in notes], float)
    assert np.array_equal(sample.boxes_xyxy_px, np.hstack([expected[:, :2], expected[:, :2] + expected[:, 2:]]))
    assert list(sample.segmentations) == [note["segmentation"] for note in notes]


def test_complete_set_is_reused_and_another_refused(tmp_path):
    source, out = make_coco(tmp_path, 9), tmp_path / "out"
    first = pack_coco(*source, out, target_samples=3)
    stamps = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert pack_coco(*source, out, target_samples=3) == first
    assert stamps == {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    other = make_coco(tmp_path / "other", 5)
    with pytest.raises(DataError, match="--overwrite"):
        pack_coco(*other, out, target_samples=3)
    assert stamps == {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    second = pack_coco(*other, out, target_samples=3, overwrite=True)
    assert len(list(out.glob("*.tar"))) == len(second.shards) == 2
    assert len(ShardSet.open(out)) == 5


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_packing_is_invisible_and_goes_on(tmp_path, workers):
    source, out = make_coco(tmp_path, 30), tmp_path / "out"
    kill = "lambda done, total: os.kill(os.getpid(), signal.SIGKILL) if done >= 10 else None"
    process = run_pack(source, out, workers=workers, progress=kill)
    process.communicate(timeout=240)
    assert process.returncode == -signal.SIGKILL
    with pytest.raises(DataError, match="unfinished"):
        ShardSet.open(out)
    finished = {path: path.stat().st_mtime_ns for path in out.glob("*.index.json")}
    assert finished
    pack_coco(*source, out, target_samples=4)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in finished.items())
    pack_coco(*source, tmp_path / "whole", target_samples=4)
    assert contents(out) == contents(tmp_path / "whole")


def test_no_packing_process_outlives_its_parent(tmp_path):
    source, out = make_coco(tmp_path, 30), tmp_path / "out"
    report = "lambda done, total: (print(done, file=sys.stderr, flush=True), __import__('time').sleep(3600))"
    process = run_pack(source, out, workers=2, progress=report)
    process.stderr.readline()
    children = psutil.Process(process.pid).children(recursive=True)
    assert children
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=240)
    assert not alive


@pytest.mark.parametrize("workers", [1, 2])
def test_disk_that_takes_no_more(tmp_path, workers):
    source, out = make_coco(tmp_path, 12), tmp_path / "out"
    # A limit on file sizes makes write() fail in mid-file, as a full disk does.
    process = run_pack(source, out, workers=workers, setup="resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))")
    error = process.communicate(timeout=240)[1].decode().strip().splitlines()[-1]
    assert process.returncode != 0
    assert "DataError: cannot write" in error
    assert "ulimit -f" in error
    assert not [path.name for path in out.iterdir() if not path.name.startswith(".")]
    assert not list(out.glob("*.tar"))
    pack_coco(*source, out, target_samples=4)
    assert len(ShardSet.open(out)) == 12


def test_interrupt_ends_quietly_with_nothing_half_written(tmp_path):
    source, out = make_coco(tmp_path, 30), tmp_path / "out"
    report = "lambda done, total: (print(done, file=sys.stderr, flush=True), __import__('time').sleep(3600))"
    process = run_pack(source, out, workers=2, progress=report)
    process.stderr.readline()
    children = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGINT)
    error = process.communicate(timeout=240)[1].decode()
    assert process.returncode != 0
    assert error.count("Traceback") == 1
    assert error.strip().endswith("KeyboardInterrupt")
    assert not psutil.wait_procs(children, timeout=240)[1]
    assert not (out / "manifest.json").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_truncated_image_names_itself(tmp_path, workers):
    annotations, images = make_coco(tmp_path, 9)
    content = (images / "5.jpg").read_bytes()
    (images / "5.jpg").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError) as caught:
        pack_coco(annotations, images, tmp_path / "out", target_samples=3, workers=workers)
    assert "5.jpg" in str(caught.value)
    assert "105" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_image_of_another_size_and_broken_run_lengths(tmp_path):
    annotations, images = make_coco(tmp_path, 4)
    root = json.loads(annotations.read_text())
    changed = json.loads(annotations.read_text())
    changed["images"][2]["height"] += 1
    annotations.write_text(json.dumps(changed))
    with pytest.raises(DataError, match="its annotations say 76 x 57"):
        pack_coco(annotations, images, tmp_path / "out")
    for note in root["annotations"]:
        size = next([i["height"], i["width"]] for i in root["images"] if i["id"] == note["image_id"])
        note["segmentation"] = {"size": size, "counts": "oooooooo"}
    annotations.write_text(json.dumps(root))
    with pytest.raises(DataError, match="mask of annotation 0"):
        pack_coco(annotations, images, tmp_path / "out")


def damage_shard(folder):
    path = folder / "shard-000001.tar"
    os.truncate(path, path.stat().st_size - 512)
    return r"shard-000001.tar is \d+ bytes long"


def remove_shard(folder):
    (folder / "shard-000001.tar").unlink()
    return "shard-000001.tar is not there"


def swap_index(folder):
    (folder / "shard-000001.index.json").write_bytes((folder / "shard-000000.index.json").read_bytes())
    return "shard-000001.index.json is not the one"


def damage_manifest(folder):
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"num_samples"', '"number"'))
    return "manifest.json is damaged"


def newer_manifest(folder):
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 99'))
    return "format version .* got 99"


@pytest.mark.parametrize("damage", [damage_shard, remove_shard, swap_index, damage_manifest, newer_manifest])
def test_damaged_set_is_named_when_opened(tmp_path, damage):
    out = tmp_path / "out"
    pack_coco(*make_coco(tmp_path, 6), out, target_samples=3)
    with pytest.raises(DataError, match=damage(out)):
        ShardSet.open(out)


def test_other_peoples_shards_are_left_alone(tmp_path):
    source, out = make_coco(tmp_path, 6), tmp_path / "out"
    out.mkdir()
    (out / "shard-000001.tar").write_bytes(b"precious")
    (out / "notes.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(DataError, match=r"shard-000001.tar without an index"):
            pack_coco(*source, out, target_samples=3, overwrite=overwrite)
    assert contents(out) == {"notes.txt": b"mine", "shard-000001.tar": b"precious"}


def test_lost_shard_is_packed_again(tmp_path):
    source, out = make_coco(tmp_path, 6), tmp_path / "out"
    pack_coco(*source, out, target_samples=3)
    whole = contents(out)
    remove_shard(out)
    pack_coco(*source, out, target_samples=3)
    assert contents(out) == whole


def test_folder_without_a_set(tmp_path):
    with pytest.raises(DataError, match="is not there"):
        ShardSet.open(tmp_path / "absent")
    with pytest.raises(DataError, match="holds no shards"):
        ShardSet.open(tmp_path)
    pack_coco(*make_coco(tmp_path, 3), tmp_path / "out")
    with pytest.raises(DataError, match="make them equal"):
        ShardSet.open(tmp_path / "out", classes=("a", "b"))


@pytest.mark.parametrize(("name", "masks"), [("bccd", False), ("nuclei_dsb2018", True)])
def test_real_sets_pack(tmp_path, name, masks):
    if not (SHARED / name).is_dir():
        pytest.skip(f"the shared data set {name} is not beside the repository")
    source = SHARED / name / "instances_val.json"
    manifest = pack_coco(source, SHARED / name / "images", tmp_path, target_mb=1, workers=2)
    shards = ShardSet.open(tmp_path)
    assert manifest.has_masks == masks
    truth, root = shards.coco_ground_truth(), json.loads(source.read_text())
    assert len(truth["annotations"]) == len(root["annotations"])
    boxes = {note["id"]: note["bbox"] for note in root["annotations"]}
    assert all(note["bbox"] == boxes[note["id"]] for note in truth["annotations"])
    for number in range(0, len(shards), 10):
        sample = decode_sample(shards.read(number), shards.label_of_category, has_masks=masks)
        assert sample.pixels.shape[:2] == tuple(shards.sizes_px[number])
        assert len(sample.boxes_xyxy_px) == len(sample.labels)
