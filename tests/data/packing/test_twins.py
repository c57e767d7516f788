"""Names that two files share, links that lead back, encodings of other systems: nothing vanishes."""

import json
import os
import unicodedata
from functools import partial

import numpy as np
import PIL.Image
import pytest
from made_sets import write_jpeg
from typer.testing import CliRunner

from piip_scale.cli.app import app
from piip_scale.cli.endings import in_one_line
from piip_scale.data.packing.coco_maps import write_label_maps
from piip_scale.data.packing.pack import pack_voc
from piip_scale.data.packing.pack_classes import pack_folders, pack_list, read_class_names
from piip_scale.data.packing.pack_maps import pack_label_maps
from piip_scale.data.packing.packing import PackOptions
from piip_scale.data.packing.walking import images_under
from piip_scale.data.reading.label_maps import decode_mapped
from piip_scale.data.reading.shards import ShardSet
from piip_scale.errors import DataError

OBJECT = "<object><name>{}</name><bndbox><xmin>5</xmin><ymin>5</ymin><xmax>20</xmax><ymax>20</ymax></bndbox></object>"


def write_png(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(np.full((48, 64), value, np.uint8)).save(path)


def file_names(folder):
    shards = ShardSet.open(folder)
    return sorted(shards.notes(number)["file_name"] for number in range(len(shards)))


def test_two_images_of_one_stem_need_maps_of_their_own(tmp_path):
    images, maps = tmp_path / "images", tmp_path / "maps"
    write_jpeg(images / "a.jpg", 48, 64, 0)
    write_png(images / "a.png")
    write_png(maps / "a.png")
    with pytest.raises(DataError, match=r"images a.jpg, a.png have one label map, a.png"):
        pack_label_maps(images, maps, tmp_path / "out", classes=["x"])
    write_png(maps / "a.jpg.png")
    pack_label_maps(images, maps, tmp_path / "out", classes=["x"])
    assert file_names(tmp_path / "out") == ["a.jpg", "a.png"]
    write_png(maps / "a.tif")
    with pytest.raises(DataError, match=r"image a.png has the label maps a.png, a.tif"):
        pack_label_maps(images, maps, tmp_path / "other", classes=["x"])


def coco_of(tmp_path, names, num_categories=2):
    images = [{"id": i, "file_name": name, "width": 64, "height": 48} for i, name in enumerate(names)]
    notes = [
        {"id": i, "image_id": i, "category_id": 1, "bbox": [10, 10, 20, 20]}
        | {"segmentation": [[10, 10, 30, 10, 30, 30, 10, 30]]}
        for i in range(len(names))
    ]
    categories = [{"id": i, "name": f"n{i}"} for i in range(num_categories)]
    path = tmp_path / "ann.json"
    path.write_text(json.dumps({"images": images, "annotations": notes, "categories": categories}))
    for name in names:
        write_png(tmp_path / "images" / name)
    return path, tmp_path / "images"


def test_the_tool_for_label_maps_writes_one_for_each_image(tmp_path):
    names = write_label_maps(*coco_of(tmp_path, ["a.png", "a.bmp", "b.png", "x.y.png"]), tmp_path / "out")
    made = sorted(path.name for path in (tmp_path / "out" / "label_maps").iterdir())
    assert made == ["a.bmp.png", "a.png.png", "b.png", "x.y.png"]
    pack_label_maps(tmp_path / "out" / "images", tmp_path / "out" / "label_maps", tmp_path / "shards", classes=names)
    assert file_names(tmp_path / "shards") == ["a.bmp", "a.png", "b.png", "x.y.png"]


@pytest.mark.parametrize(("count", "fits"), [(254, True), (255, False), (300, False)])
def test_the_tool_for_label_maps_knows_how_many_classes_8_bits_hold(tmp_path, count, fits):
    files = coco_of(tmp_path, ["a.png"], count)
    if fits:
        assert len(write_label_maps(*files, tmp_path / "out")) == 255
        return
    with pytest.raises(DataError, match="at most 254 categories"):
        write_label_maps(*files, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tool_ends_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        in_one_line(partial(write_label_maps, *coco_of(tmp_path, ["a.png"], 300), tmp_path / "out"), "tool")
    assert end.value.code == 2
    assert capsys.readouterr().err.splitlines()[0].startswith("tool: error: ")


def write_xml(folder, text, name="a.xml", encoding="utf-8", declare=True):
    folder.mkdir(exist_ok=True)
    head = f'<?xml version="1.0" encoding="{encoding}"?>' if declare else ""
    (folder / name).write_bytes((head + text).encode(encoding))


def annotation(inner="a.jpg", name="cat"):
    return f"<annotation><filename>{inner}</filename>{OBJECT.format(name)}</annotation>"


def test_the_xml_chooses_among_images_of_its_name(tmp_path):
    write_jpeg(tmp_path / "images" / "a.jpg", 48, 64, 0)
    write_png(tmp_path / "images" / "a.png")
    write_xml(tmp_path / "ann", annotation("C:\\set\\a.png"))
    pack_voc(tmp_path / "ann", tmp_path / "images", tmp_path / "out")
    assert file_names(tmp_path / "out") == ["a.png"]
    write_xml(tmp_path / "ann", annotation("b.jpg"))
    with pytest.raises(DataError, match=r"has the images a.jpg, a.png: got 'b.jpg'"):
        pack_voc(tmp_path / "ann", tmp_path / "images", tmp_path / "other")


def test_two_xml_files_of_one_image_are_told(tmp_path):
    write_jpeg(tmp_path / "images" / "a.jpg", 48, 64, 0)
    for name in ("a.xml", "old.xml"):
        write_xml(tmp_path / "ann", annotation(), name)
    with pytest.raises(DataError, match=r"a.xml, old.xml of .* are all of the image a.jpg"):
        pack_voc(tmp_path / "ann", tmp_path / "images", tmp_path / "out")


@pytest.mark.parametrize("encoding", ["gb2312", "Shift_JIS", "utf-16", "utf-8-sig", "GBK", "big5"])
def test_xml_of_any_encoding(tmp_path, encoding):
    write_jpeg(tmp_path / "images" / "a.JPG", 48, 64, 0)
    name = "貓" if encoding == "big5" else "犬"
    write_xml(tmp_path / "ann", annotation(name=name), encoding=encoding, declare=encoding != "utf-8-sig")
    pack_voc(tmp_path / "ann", tmp_path / "images", tmp_path / "out")
    assert ShardSet.open(tmp_path / "out").classes == (name,)


@pytest.mark.parametrize(
    "head",
    [
        '<?xml version="1.0" encoding="klingon"?>',
        '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]>',
        '<!DOCTYPE a [<!ENTITY a "'
        + "a" * 40
        + '">'
        + "".join(f'<!ENTITY {chr(98 + i)} "{f"&{chr(97 + i)};" * 40}">' for i in range(6))
        + '<!ENTITY x "&g;">]>',
    ],
    ids=["unknown encoding", "a file of the system", "a bomb"],
)
def test_xml_that_is_none(tmp_path, head):
    write_jpeg(tmp_path / "images" / "a.jpg", 48, 64, 0)
    write_xml(tmp_path / "ann", head + annotation(name="&x;"), declare=False)
    with pytest.raises(DataError, match="is no XML"):
        pack_voc(tmp_path / "ann", tmp_path / "images", tmp_path / "out")


def test_links_that_lead_back_are_told_and_others_followed(tmp_path):
    folder = tmp_path / "images"
    write_jpeg(folder / "cat" / "a.jpg", 40, 40, 0)
    os.symlink(folder / "cat", folder / "same")
    assert images_under(folder) == ["cat/a.jpg", "same/a.jpg"]
    os.symlink("..", folder / "cat" / "back")
    os.symlink("/", folder / "cat" / "root")
    with pytest.raises(DataError, match=r"cat/back is a link to a folder above it") as caught:
        pack_folders(folder, tmp_path / "out")
    # Two in each of both folders; and what is followed leads two classes to one file.
    assert len(caught.value.lines) == 5
    assert "images cat/a.jpg, same/a.jpg are one file" in caught.value.lines[-1]


def test_what_cannot_be_read_is_not_passed_over(tmp_path, monkeypatch):
    folder = tmp_path / "images"
    write_jpeg(folder / "cat" / "a.jpg", 40, 40, 0)
    os.mkfifo(folder / "cat" / "pipe.jpg")
    with pytest.raises(DataError, match=r"pipe.jpg cannot be read: got 'it is no regular file'"):
        pack_folders(folder, tmp_path / "out")
    scandir = os.scandir

    def refusing(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    (folder / "cat" / "locked").mkdir()
    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(DataError, match="locked cannot be read"):
        images_under(folder, "cat")


def test_names_of_other_systems_in_folders(tmp_path):
    folder, nfd = tmp_path / "images", unicodedata.normalize("NFD", "café")
    write_jpeg(folder / nfd / "a.jpg", 40, 40, 0)
    os.rename(folder / nfd / "a.jpg", os.fsencode(folder / nfd) + b"/\xe9.jpg")
    (tmp_path / "names.txt").write_bytes("\ufeffcafé\r\n".encode())
    pack_folders(folder, tmp_path / "out", classes=read_class_names(tmp_path / "names.txt"))
    assert ShardSet.open(tmp_path / "out").classes == ("café",)
    assert file_names(tmp_path / "out") == [f"{nfd}/\\xe9.jpg"]
    (folder / "cat").mkdir()
    (folder / "cat ").mkdir()
    with pytest.raises(DataError, match=r"two folders of .* name one class"):
        pack_folders(folder, tmp_path / "other")


def test_lists_of_other_systems(tmp_path):
    write_jpeg(tmp_path / "images" / "x y.jpg", 40, 40, 0)
    write_jpeg(tmp_path / "images" / "b.jpg", 40, 40, 1)
    (tmp_path / "list.txt").write_bytes("images\\x%20y.jpg\t0\r\nimages/b.jpg 1\r\n".encode("utf-16"))
    pack_list(tmp_path / "list.txt", tmp_path, tmp_path / "out", classes=["a", "b"])
    assert file_names(tmp_path / "out") == ["images/b.jpg", "images/x y.jpg"]


def test_brackets_in_names_and_paths_are_letters(tmp_path):
    annotations, images = coco_of(tmp_path, ["[i].png"], 3)
    names = {"n0": "cat [wild]", "n1": "dog [/b]", "n2": "[red]"}
    root = json.loads(annotations.read_text())
    for category in root["categories"]:
        category["name"] = names[category["name"]]
    annotations.write_text(json.dumps(root))
    out = tmp_path / "out [/x]"
    for words in (
        ["pack", "coco", annotations, "--images", images, "--out", out],
        ["verify", out, "--workers", "1"],
        ["show", out, "--out", tmp_path / "sheet.png"],
    ):
        result = CliRunner().invoke(app, ["shards", *map(str, words)])
        assert result.exit_code == 0, result.output
    assert all(f"class {name}" in result.output for name in names.values())
    assert (tmp_path / "sheet.png").is_file()


@pytest.mark.parametrize(("size", "turned"), [((48, 64), False), ((64, 48), True)])
@pytest.mark.parametrize("exif", ["auto", "apply", "stored"])
def test_a_label_map_states_the_view_that_it_was_drawn_on(tmp_path, size, turned, exif, caplog):
    caplog.set_level("INFO")
    write_jpeg(tmp_path / "images" / "a.jpg", 48, 64, 0)
    with PIL.Image.open(tmp_path / "images" / "a.jpg") as image:
        data = image.getexif()
        data[0x0112] = 6
        image.save(tmp_path / "images" / "a.jpg", exif=data)
    (tmp_path / "maps").mkdir()
    PIL.Image.fromarray(np.zeros(size, np.uint8)).save(tmp_path / "maps" / "a.png")
    files, how = (tmp_path / "images", tmp_path / "maps", tmp_path / "out"), PackOptions(exif=exif)
    if exif == {True: "stored", False: "apply"}[turned]:
        with pytest.raises(DataError, match="its image is"):
            pack_label_maps(*files, classes=["x"], how=how)
        return
    manifest = pack_label_maps(*files, classes=["x"], how=how)
    shards = ShardSet.open(tmp_path / "out")
    assert shards.sizes_px.tolist() == [list(size)]
    assert decode_mapped(shards.read(0), shards.map_rule).pixels.shape[:2] == size
    assert manifest.made_with.get("num_turned", 0) == int(turned)
    assert ("1 images are turned as their EXIF data say" in caplog.text) == turned
