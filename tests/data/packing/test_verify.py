"""Verifying finds what was done to a set; the summary counts what pycocotools counts."""

import json
from collections import Counter

import numpy as np
import PIL.Image
import pytest
from made_sets import SHARED, make_coco

from piip_scale.data.images import decode_image
from piip_scale.data.packing.pack import pack_coco
from piip_scale.data.packing.summary import summarise
from piip_scale.data.packing.verify import look_at_objects, verify_shards
from piip_scale.data.reading.files import json_bytes
from piip_scale.data.reading.raw import RawSample, checksum
from piip_scale.data.reading.shards import ShardSet
from piip_scale.errors import DataError


@pytest.fixture
def packed(tmp_path):
    pack_coco(*make_coco(tmp_path, 12), tmp_path / "out", target_samples=5)
    return tmp_path / "out"


def overwrite(folder, content: bytes, place: float) -> str:
    """Changes 20 bytes inside a member of a shard; returns the shard's name."""
    for path in sorted(folder.glob("*.tar")):
        position = path.read_bytes().find(content)
        if position >= 0:
            with open(path, "r+b") as file:
                file.seek(position + int(place * len(content)))
                file.write(b"#" * 20)
            return path.name
    raise AssertionError("not in any shard")


@pytest.mark.parametrize("workers", [1, 2])
def test_sound_set_has_no_problem(packed, workers):
    progress = []
    report = verify_shards(packed, workers=workers, on_progress=lambda *p: progress.append(p))
    assert report.problems == ()
    assert (report.num_samples, report.num_targets) == (12, 18)
    assert progress[-1] == (12, 12)
    assert len(progress) == 3


def test_every_damage_is_named(packed):
    shards = ShardSet.open(packed)
    image, notes = shards.read(2), shards.read(7)
    first, second = overwrite(packed, image.image, 0.5), overwrite(packed, notes.notes, 0.5)
    problems = verify_shards(packed, workers=2).problems
    assert len(problems) == 4
    assert [problem for problem in problems if "SHA-256" in problem and (first in problem or second in problem)]
    for name, key in ((first, image.key), (second, notes.key)):
        assert any(problem.startswith(f"{name}: sample {key} changed") for problem in problems)
    assert all("\n" not in problem for problem in problems)


def test_annotations_that_packing_would_refuse_are_found(packed):
    shards = ShardSet.open(packed)
    raw = shards.read(3)
    sound = json.loads(raw.notes)

    def problem(**change):
        notes = json.loads(raw.notes)
        notes["annotations"][1] |= change
        content = json_bytes(notes)
        changed = RawSample(raw.key, raw.image, content, checksum(raw.image, content))
        with pytest.raises(DataError) as caught:
            look_at_objects(shards, changed, 0)
        return str(caught.value)

    assert look_at_objects(shards, raw, 0)[0] == len(sound["annotations"]) == 3
    assert "outside its image" in problem(bbox=[60, 40, 30, 30])
    assert "does not reach into its box" in problem(segmentation=[[60, 50, 63, 50, 63, 53]])
    assert "not what the manifest says" in problem(category_id=5)
    assert "run lengths" in problem(segmentation={"size": [60, 64], "counts": "ooooo"})


def test_images_shared_with_another_set_are_found_by_their_pixels(packed, tmp_path):
    annotations, images = make_coco(tmp_path / "other", 4)
    root = json.loads(annotations.read_text())
    for entry in [*root["images"], *root["annotations"]]:
        entry["image_id" if "image_id" in entry else "id"] += 1000
    pixels = decode_image((images / "1.jpg").read_bytes(), "1.jpg")
    PIL.Image.fromarray(pixels).save(images / "1.png")
    root["images"][1]["file_name"] = "1.png"
    (images / "2.jpg").write_bytes((images / "2.jpg").read_bytes() + b"tail")
    pixels = decode_image((images / "3.jpg").read_bytes(), "3.jpg").copy()
    pixels[0, 0, 0] ^= 1
    PIL.Image.fromarray(pixels).save(images / "3.png")
    root["images"][3]["file_name"] = "3.png"
    annotations.write_text(json.dumps(root))
    pack_coco(annotations, images, tmp_path / "other" / "out")
    report = verify_shards(packed, other=tmp_path / "other" / "out", workers=1)
    assert sorted(report.shared_images) == [(f"{100 + i:012d}", f"{1100 + i:012d}") for i in (0, 1, 2)]
    assert report.problems == ()


def test_summary_counts(packed):
    truth = ShardSet.open(packed).coco_ground_truth()
    summary = summarise(ShardSet.open(packed))
    assert summary.num_images == 12
    assert summary.objects_of_class == {
        name: sum(note["category_id"] == key for note in truth["annotations"]) for name, key in (("b", 2), ("a", 7))
    }
    assert summary.objects_of_size == {"small": 18, "medium": 0, "large": 0}
    assert (summary.num_empty_images, summary.objects_per_image, summary.num_crowds) == (3, (1, 3), 0)
    assert (summary.short_edges_px, summary.long_edges_px) == ((48, 54, 64), (64, 70, 76))


def test_summary_of_a_real_set(tmp_path):
    if not (SHARED / "bccd").is_dir():
        pytest.skip("the shared data set bccd is not beside the repository")
    source = SHARED / "bccd" / "instances_val.json"
    pack_coco(source, SHARED / "bccd" / "images", tmp_path)
    summary, root = summarise(ShardSet.open(tmp_path)), json.loads(source.read_text())
    names = {category["id"]: category["name"] for category in root["categories"]}
    assert summary.objects_of_class == Counter(names[note["category_id"]] for note in root["annotations"])
    areas = np.array([note["area"] for note in root["annotations"]])
    assert list(summary.objects_of_size.values()) == np.histogram(areas, [0, 32**2, 96**2, 1e9])[0].tolist()
    assert summary.short_edges_px == (480, 480, 480)
