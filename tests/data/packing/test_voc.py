"""Pascal VOC: boxes counted from pixel 1, what is difficult is ignored, instance maps become masks."""

import json

import numpy as np
import PIL.Image
import pytest
from made_sets import write_jpeg
from pycocotools import mask as coco_mask

from piip_scale.data.packing.pack import pack_voc
from piip_scale.data.packing.verify import verify_shards
from piip_scale.data.reading.decoding import decode_sample
from piip_scale.data.reading.shards import ShardSet
from piip_scale.errors import DataError

OBJECT = """<object><name>{name}</name><pose>Left</pose><truncated>{truncated}</truncated>
<difficult>{difficult}</difficult><bndbox><xmax>{box[2]}</xmax><xmin>{box[0]}</xmin><ymin>{box[1]}</ymin>
<ymax>{box[3]}</ymax></bndbox><part><name>head</name><bndbox><xmin>1</xmin></bndbox></part></object>"""
SIZE = "<size><width>64</width><height>48</height><depth>3</depth></size>"


def write_entry(folder, name, objects, *, size=SIZE, file_name="renamed_since.jpg"):
    lines = [OBJECT.format(**({"truncated": 0, "difficult": 0} | item)) for item in objects]
    text = f"<annotation><filename>{file_name}</filename>{size}{''.join(lines)}</annotation>"
    (folder / "Annotations").mkdir(exist_ok=True)
    (folder / "Annotations" / f"{name}.xml").write_text(text)


@pytest.fixture
def voc(tmp_path):
    for number, name in enumerate(("2007_a", "2007_b", "2007_c")):
        write_jpeg(tmp_path / "JPEGImages" / f"{name}.jpg", 48, 64, number)
    write_entry(
        tmp_path,
        "2007_a",
        [
            {"name": "dog", "box": (1, 1, 64, 48), "truncated": 1},
            {"name": "cat", "box": (11, 21, 30, 40), "difficult": 1},
        ],
    )
    write_entry(tmp_path, "2007_b", [{"name": "cat", "box": (5.5, 6, 20, 30)}], size="")
    write_entry(tmp_path, "2007_c", [], size="<size><width>0</width><height>0</height></size>")
    return tmp_path


def pack(voc, out="out", **options):
    pack_voc(voc / "Annotations", voc / "JPEGImages", voc / out, **options)
    return ShardSet.open(voc / out)


def test_boxes_classes_and_what_is_difficult(voc):
    shards = pack(voc)
    assert shards.classes == ("cat", "dog")
    assert shards.sizes_px.tolist() == [[48, 64]] * 3
    sample = decode_sample(shards.read(0), shards.label_of_category, has_masks=False)
    assert sample.boxes_xyxy_px.tolist() == [[0, 0, 64, 48], [10, 20, 30, 40]]
    assert sample.labels.tolist() == [1, 0]
    assert sample.is_crowd.tolist() == [False, True]
    notes = [shards.notes(number) for number in range(3)]
    assert [note["file_name"] for note in notes] == ["2007_a.jpg", "2007_b.jpg", "2007_c.jpg"]
    assert notes[1]["annotations"][0]["bbox"] == [4.5, 5, 15.5, 25]
    assert notes[2]["annotations"] == []
    assert verify_shards(voc / "out", workers=1).problems == ()


def test_a_list_and_classes_choose(voc):
    (voc / "train.txt").write_text("2007_c\n2007_a\n\n")
    shards = pack(voc, names=voc / "train.txt", classes=("dog", "cat", "bird"))
    assert shards.classes == ("dog", "cat", "bird")
    assert [shards.notes(number)["file_name"] for number in range(len(shards))] == ["2007_a.jpg", "2007_c.jpg"]
    assert [note["category_id"] for note in shards.notes(0)["annotations"]] == [0, 1]


def write_map(voc, name, pixels):
    (voc / "SegmentationObject").mkdir(exist_ok=True)
    image = PIL.Image.fromarray(pixels)
    image.putpalette(np.random.default_rng(0).integers(0, 255, 768, np.uint8).tobytes())
    image.save(voc / "SegmentationObject" / f"{name}.png")


def test_instance_maps_become_masks_and_what_they_do_not_show_is_ignored(voc):
    pixels = np.zeros((48, 64), np.uint8)
    pixels[4:44, 2:60] = 1
    pixels[20:22, 10:12] = 255
    write_map(voc, "2007_a", pixels)
    write_map(voc, "2007_b", np.zeros((48, 64), np.uint8))
    (voc / "train.txt").write_text("2007_a\n2007_b\n")
    shards = pack(voc, names=voc / "train.txt", instance_maps=voc / "SegmentationObject")
    assert shards.manifest.has_masks
    first, second = shards.notes(0)["annotations"]
    assert np.array_equal(coco_mask.decode(first["segmentation"]), pixels == 1)
    assert (first["area"], first["iscrowd"]) == ((pixels == 1).sum(), 0)
    assert (second["segmentation"], second["iscrowd"]) == ([[10, 20, 30, 20, 30, 40, 10, 40]], 1)
    assert shards.notes(1)["annotations"][0]["iscrowd"] == 1
    assert verify_shards(voc / "out", workers=1).problems == ()


def no_xml(voc):
    (voc / "Annotations" / "2007_b.xml").write_text("<annotation><object>")
    return {}, "2007_b.xml is no XML"


def no_image(voc):
    (voc / "JPEGImages" / "2007_b.jpg").unlink()
    return {}, r"image of .*2007_b.xml is not there"


def truncated_image(voc):
    path = voc / "JPEGImages" / "2007_b.jpg"
    path.write_bytes(path.read_bytes()[:-300])
    return {}, r"2007_b.jpg\) cannot be decoded"


def other_size(voc):
    write_jpeg(voc / "JPEGImages" / "2007_a.jpg", 40, 64, 0)
    return {}, "annotations say 64 x 48"


def unknown_class(voc):
    return {"classes": ("dog",)}, r"object 2 of .*2007_a.xml is of class 'cat'; the classes are dog"


def box_outside(voc):
    write_entry(voc, "2007_c", [{"name": "dog", "box": (30, 10, 70, 20)}])
    return {}, r"object 1 of .*2007_c.xml has the box \[30.0, 10.0, 70.0, 20.0\]"


def empty_box(voc):
    write_entry(voc, "2007_c", [{"name": "dog", "box": (30, 10, 20, 20)}])
    return {}, "has an inside"


def no_number(voc):
    write_entry(voc, "2007_c", [{"name": "dog", "box": ("?", 10, 20, 20)}])
    return {}, r"object 1 of .*2007_c.xml has bndbox/xmin: got '\?'"


def odd_difficult(voc):
    write_entry(voc, "2007_c", [{"name": "dog", "box": (3, 10, 20, 20), "difficult": "yes"}])
    return {}, "has difficult: got 'yes'"


def nameless(voc):
    write_entry(voc, "2007_c", [{"name": " ", "box": (3, 10, 20, 20)}])
    return {}, "has no name"


def list_of_one_class(voc):
    (voc / "dog_train.txt").write_text("2007_a  1\n2007_b -1\n")
    return {"names": voc / "dog_train.txt"}, "it holds one name"


def absent_name(voc):
    (voc / "train.txt").write_text("2007_x\n")
    return {"names": voc / "train.txt"}, r"2007_x.xml cannot be read"


def no_map(voc):
    return {"instance_maps": voc}, r"2007_a.png cannot be read; every image"


def map_of_more(voc):
    for name in ("2007_a", "2007_b"):
        write_map(voc, name, np.full((48, 64), 2, np.uint8))
    return {"instance_maps": voc / "SegmentationObject"}, r"2007_b.png holds number 2; .* has 1 objects"


def map_of_another_size(voc):
    write_map(voc, "2007_a", np.zeros((40, 64), np.uint8))
    return {"instance_maps": voc / "SegmentationObject"}, r"2007_a.png is \(64, 40\) px; its image is 64 x 48"


@pytest.mark.parametrize(
    "spoil",
    [
        no_xml,
        no_image,
        truncated_image,
        other_size,
        unknown_class,
        box_outside,
        empty_box,
        no_number,
        odd_difficult,
        nameless,
        list_of_one_class,
        absent_name,
        no_map,
        map_of_more,
        map_of_another_size,
    ],
    ids=lambda spoil: spoil.__name__,
)
def test_what_is_wrong_is_told_in_one_line(voc, spoil):
    options, message = spoil(voc)
    with pytest.raises(DataError, match=message) as caught:
        pack(voc, **options)
    assert "\n" not in str(caught.value)
    assert not (voc / "out" / "manifest.json").exists()


def test_boxes_counted_from_0_are_cut_by_a_pixel_and_others_when_asked(voc):
    write_entry(voc, "2007_c", [{"name": "dog", "box": (0, 0, 20, 20)}])
    assert pack(voc, "zero").notes(2)["annotations"][0]["bbox"] == [0, 0, 20, 20]
    write_entry(voc, "2007_c", [{"name": "dog", "box": (30, 10, 70, 20)}, {"name": "dog", "box": (80, 1, 90, 9)}])
    shards = pack(voc, clip_boxes=True)
    assert [note["bbox"] for note in shards.notes(2)["annotations"]] == [[29, 9, 35, 11]]
    made = json.loads((voc / "out" / "manifest.json").read_text())["made_with"]
    assert (made["num_clipped"], made["num_dropped"]) == (1, 1)


def test_sides_that_are_not_stated_are_the_images(voc, caplog):
    write_entry(voc, "2007_b", [], size="<size><width>64.0</width></size>")
    shards = pack(voc)
    assert shards.sizes_px.tolist() == [[48, 64]] * 3
    assert "took the sizes of 2 images from their files" in caplog.text
    assert shards.manifest.made_with["num_sized"] == 2


@pytest.mark.parametrize("width", ["-64", "wide", "63.5", "nan"])
def test_a_side_is_a_number(voc, width):
    write_entry(voc, "2007_b", [], size=f"<size><width>{width}</width><height>48</height></size>")
    with pytest.raises(DataError, match=r"width of .*2007_b.xml"):
        pack(voc)


@pytest.mark.parametrize("inside", ["2007_a.png", "C:\\images\\2007_a.png"])
def test_of_two_images_of_a_name_the_one_that_the_file_names_is_packed(voc, inside):
    PIL.Image.new("RGB", (64, 48), "red").save(voc / "JPEGImages" / "2007_a.png")
    write_entry(voc, "2007_a", [], file_name=inside)
    assert pack(voc).read(0).image == (voc / "JPEGImages" / "2007_a.png").read_bytes()
    write_entry(voc, "2007_a", [], file_name="2007_a.jpg")
    assert pack(voc, "other").read(0).image == (voc / "JPEGImages" / "2007_a.jpg").read_bytes()


def test_a_name_that_is_cleaned_is_logged_once_a_set(voc, caplog):
    for name in ("2007_a", "2007_b"):
        write_entry(voc, name, [{"name": "black\ncat", "box": (1, 1, 9, 9)}] * 2)
    for out in ("one", "two"):
        assert pack(voc, out).classes == ("black cat",)
    assert sum("is written 'black cat'" in line for line in caplog.messages) == 2


def test_a_file_that_is_no_annotation_is_not_an_image_without_objects(voc):
    (voc / "Annotations" / "2007_b.xml").write_text("<html><body>404</body></html>")
    with pytest.raises(DataError, match=r"2007_b.xml holds <html>"):
        pack(voc)


def test_a_namespace_hides_no_objects(voc):
    path = voc / "Annotations" / "2007_b.xml"
    path.write_text(path.read_text().replace("<annotation>", "<annotation xmlns='http://example.org'>"))
    assert len(pack(voc).notes(1)["annotations"]) == 1
