"""Label maps in shards: what webdataset and mmseg read of them, and what is refused."""

import json

import numpy as np
import PIL.Image
import pytest
import webdataset
from made_sets import make_coco, make_maps
from typer.testing import CliRunner

from piip_scale.cli.app import app
from piip_scale.data.packing.coco_maps import write_label_maps
from piip_scale.data.packing.pack import pack_coco
from piip_scale.data.packing.pack_maps import pack_label_maps
from piip_scale.data.packing.packing import PackOptions
from piip_scale.data.packing.summary import summarise_maps
from piip_scale.data.packing.verify import verify_shards
from piip_scale.data.reading.label_maps import IGNORED, decode_label_map, decode_mapped
from piip_scale.data.reading.manifest import MANIFEST, MapRule, index_name
from piip_scale.data.reading.shards import ShardSet
from piip_scale.errors import DataError
from piip_scale.tasks import mmcv_ext

NAMES = ("sky", "wall", "tree", "road")


@pytest.fixture
def folders(tmp_path):
    return make_maps(tmp_path)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("reduce_zero_label", [False, True])
def test_labels_are_mmsegs(folders, tmp_path, reduce_zero_label):
    pack_label_maps(*folders, tmp_path / "out", classes=NAMES, reduce_zero_label=reduce_zero_label)
    shards = ShardSet.open(tmp_path / "out", NAMES, "segmentation")
    mmcv_ext.install()
    from mmseg.datasets.transforms import LoadAnnotations  # not before the stand-in for mmcv's compiled ops

    theirs = LoadAnnotations(reduce_zero_label=reduce_zero_label, imdecode_backend="pillow")
    for number in range(len(shards)):
        sample = decode_mapped(shards.read(number), shards.map_rule)
        path = folders[1] / shards.notes(number)["file_name"].replace(".jpg", ".png")
        told = {"seg_map_path": str(path), "reduce_zero_label": reduce_zero_label, "seg_fields": []}
        expected = theirs(told)["gt_seg_map"]
        np.testing.assert_array_equal(sample.labels, expected)
        assert sample.labels.shape == sample.pixels.shape[:2] == tuple(shards.sizes_px[number])
    assert sorted(shards.image_ids) == list(range(6))


def test_webdataset_reads_image_and_label_map(folders, tmp_path):
    pack_label_maps(*folders, tmp_path / "out", classes=NAMES, how=PackOptions(target_samples=4))
    urls = sorted(map(str, (tmp_path / "out").glob("*.tar")))
    read = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert len(read) == 6
    for sample in read:
        file = json.loads(sample["json"])["file_name"]
        assert sample["jpg"] == (folders[0] / file).read_bytes()
        assert sample["seg.png"] == (folders[1] / file.replace(".jpg", ".png")).read_bytes()


def test_same_bytes_for_any_processes_and_a_killed_packing_is_finished(folders, tmp_path):
    for name, workers in (("a", 1), ("b", 2)):
        pack_label_maps(*folders, tmp_path / name, classes=NAMES, how=PackOptions(target_samples=2, workers=workers))
    whole = contents(tmp_path / "a")
    assert whole == contents(tmp_path / "b")
    kept = (tmp_path / "b" / "shard-000000.tar").stat().st_mtime_ns
    for name in (MANIFEST, "shard-000001.tar", index_name("shard-000001.tar")):
        (tmp_path / "b" / name).unlink()
    pack_label_maps(*folders, tmp_path / "b", classes=NAMES, how=PackOptions(target_samples=2))
    assert contents(tmp_path / "b") == whole
    assert (tmp_path / "b" / "shard-000000.tar").stat().st_mtime_ns == kept
    with pytest.raises(DataError, match="another input"):
        pack_label_maps(*folders, tmp_path / "b", classes=NAMES, reduce_zero_label=True)


def test_what_does_not_fit_is_refused_by_name(folders, tmp_path):
    images, maps = folders

    def refused(match, **options):
        with pytest.raises(DataError, match=match) as caught:
            pack_label_maps(images, maps, tmp_path / "out", **{"classes": NAMES, **options})
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out" / MANIFEST).exists()

    refused("got 3.*3 classes are 0-2", classes=NAMES[:3])
    refused("1 to 255 different names", classes=())
    refused("1 to 255 different names", classes=("a", "a"))
    path = maps / "scene0" / "photo_2.png"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused(r"photo_2.png.* cannot be decoded")
    for array, told in (
        (np.zeros((40, 56), np.uint8), "photo_2.png.* is 56 x 40 px"),
        (np.zeros((42, 56, 3), np.uint8), "mode RGB"),
        (np.full((42, 56), 300, np.uint16), "got 300"),
    ):
        PIL.Image.fromarray(array).save(path)
        refused(told)
    path.unlink()
    refused("photo_2.*has no label map")
    path.write_bytes(whole)
    (maps / "more.png").write_bytes(whole)
    refused("more.*has no image")


def test_a_palette_is_read_by_its_numbers():
    import io

    image = PIL.Image.fromarray(np.array([[0, 1, 2, 255]], np.uint8), mode="L").convert("P")
    image.putpalette([9, 9, 9] * 256)
    file = io.BytesIO()
    image.save(file, "PNG")
    assert decode_label_map(file.getvalue(), MapRule(3, False), "it").tolist() == [[0, 1, 2, IGNORED]]
    assert decode_label_map(file.getvalue(), MapRule(2, True), "it").tolist() == [[IGNORED, 0, 1, IGNORED]]


def test_verify_and_summary_read_the_maps(folders, tmp_path):
    pack_label_maps(*folders, tmp_path / "out", classes=NAMES)
    report = verify_shards(tmp_path / "out", workers=1)
    assert (report.kind, report.num_samples, report.num_targets, report.problems) == ("segmentation", 6, 6, ())
    shards = ShardSet.open(tmp_path / "out")
    stored = np.concatenate([np.array(PIL.Image.open(path)).ravel() for path in folders[1].rglob("*.png")])
    summary = summarise_maps(shards)
    for label, name in enumerate(NAMES):
        assert summary.share_of_class[name] == pytest.approx((stored == label).mean())
    assert summary.ignored_share == pytest.approx((stored == IGNORED).mean())


def test_a_changed_map_is_found(folders, tmp_path):
    pack_label_maps(*folders, tmp_path / "out", classes=NAMES)
    (shard,) = (tmp_path / "out").glob("*.tar")
    content = bytearray(shard.read_bytes())
    content[content.index(b"IDAT") + 12] ^= 255
    shard.write_bytes(content)
    problems = verify_shards(tmp_path / "out", workers=1).problems
    assert "SHA-256" in problems[0]
    assert "changed since it was packed" in problems[1]


def test_commands_pack_verify_and_draw(folders, tmp_path):
    (tmp_path / "names.txt").write_text("\n".join(NAMES) + "\n")
    out = str(tmp_path / "out")
    pack = ["shards", "pack", "label-maps", folders[1], "--images", folders[0], "--out", out]
    pack += ["--class-names", tmp_path / "names.txt", "--workers", "1"]
    for command, said in (
        (pack, "6 images, 6 label maps"),
        (["shards", "verify", out, "--workers", "1"], "6 label maps, 0 problems"),
        (["shards", "show", out, "--out", tmp_path / "sheet.png"], "class tree"),
    ):
        result = CliRunner().invoke(app, list(map(str, command)))
        assert result.exit_code == 0, result.output
        assert said in result.output
    assert PIL.Image.open(tmp_path / "sheet.png").width > 360


def test_a_set_of_another_kind_is_told(folders, tmp_path):
    pack_label_maps(*folders, tmp_path / "maps_set", classes=NAMES)
    pack_coco(*make_coco(tmp_path / "coco", 3), tmp_path / "objects")
    for kind, folder in (("detection", "maps_set"), ("segmentation", "objects")):
        with pytest.raises(DataError, match=f"this needs a set for {kind}"):
            ShardSet.open(tmp_path / folder, kind=kind)


def test_coco_masks_become_label_maps(tmp_path):
    annotations, images = make_coco(tmp_path / "coco", 6)
    names = write_label_maps(annotations, images, tmp_path / "maps")
    assert names == ("background", "b", "a")
    root = json.loads(annotations.read_text())
    label_of = {category["id"]: names.index(category["name"]) for category in root["categories"]}
    for image in root["images"]:
        labels = np.array(PIL.Image.open(tmp_path / "maps/label_maps" / image["file_name"].replace("jpg", "png")))
        notes = [note for note in root["annotations"] if note["image_id"] == image["id"]]
        assert set(np.unique(labels)) - {0} <= {label_of[note["category_id"]] for note in notes}
        for note in sorted(notes, key=lambda note: note["area"])[:1]:
            x, y, width, height = note["bbox"]
            # Well inside the triangle, of which the smallest is on top.
            assert labels[int(y + height * 0.3), int(x + width * 0.3)] == label_of[note["category_id"]]
    pack_label_maps(tmp_path / "maps/images", tmp_path / "maps/label_maps", tmp_path / "out", classes=names)
    assert verify_shards(tmp_path / "out", workers=1).num_targets == 6
