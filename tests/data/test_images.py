"""Image files of any format decode to RGB or to the numbers of a map; what does not is reported in one line."""

import io
import itertools
import pickle
import warnings

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
from image_files import PHOTO, encoded, png_of_bits, tiff_of_bits

from piip_scale.data.images import ImageError, decode_image, decode_map, image_facts, read_file, read_photo
from piip_scale.data.orientation import oriented_size, resolve_orientation, turned
from piip_scale.errors import DataError

JPEG = encoded(PHOTO, "JPEG")
READERS = (decode_image, image_facts, decode_map)


def test_other_image_formats_decode(tmp_path):
    for suffix in ("png", "bmp", "webp", "tiff"):
        options = {"lossless": True} if suffix == "webp" else {}
        assert np.array_equal(decode_image(encoded(PHOTO, suffix, **options), "x"), PHOTO)
    assert np.array_equal(decode_image(encoded(PHOTO[..., 0], "PNG"), "x"), PHOTO[..., :1].repeat(3, 2))
    content = encoded(PHOTO, "PNG")
    for broken in (content[: len(content) // 2], b"text", b""):
        with pytest.raises(DataError, match="cannot be decoded"):
            decode_image(broken, "x")
    with pytest.raises(DataError, match="not 8-bit"):
        decode_image(encoded(PHOTO[..., 0].astype(np.uint16), "PNG"), "x")


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "0 bytes in no format"), (b"not an image", "12 bytes in no format"), (b"%!PS-Adobe-3.0 EPSF-3.0\n", "no f")],
)
def test_what_no_decoder_takes_is_one_line(content, reason):
    for read in READERS:
        with pytest.raises(ImageError, match=reason) as caught:
            read(content, "x.png")
        assert "x.png" in caught.value.line
        assert "0x" not in caught.value.line


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP"])
def test_one_limit_holds_for_every_reader_and_format(kind):
    content = encoded(PIL.Image.new("L", (64, 50)), kind)
    for read in READERS:
        with pytest.raises(ImageError, match=r"x is 64 x 50 px; at most 3199 pixels.*--max-pixels.*to 3200"):
            read(content, "x", max_pixels=3199)
    assert decode_image(content, "x", max_pixels=3200).shape == (50, 64, 3)
    assert image_facts(content, "x", max_pixels=3200).stored_size_px == (50, 64)


def test_a_file_larger_than_pillow_takes_is_read_up_to_our_limit(monkeypatch):
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 10)
    assert decode_image(encoded(PHOTO, "PNG"), "x").shape == PHOTO.shape
    assert PIL.Image.MAX_IMAGE_PIXELS == 10


def test_a_header_that_promises_gigabytes_is_refused_before_decoding():
    bomb = png_of_bits(np.zeros((1, 8), int), 1, size=(2**31 - 1, 2**31 - 1))
    for read in READERS:
        with pytest.raises(ImageError, match="2147483647 x 2147483647 px"):
            read(bomb, "x")


def test_flawed_jpegs_decode_and_say_what_is_wrong():
    whole = decode_image(JPEG, "x")
    for content, reason in ((JPEG[:-2], "no end mark"), (JPEG[:-2] + b"abcabc" + JPEG[-2:], "extraneous bytes")):
        flaws = []
        assert np.array_equal(decode_image(content, "x", flaws=flaws), whole)
        assert len(flaws) == 1
        assert reason in flaws[0]
    flaws = []
    assert np.array_equal(decode_image(JPEG + b"of a phone" * 9, "x", flaws=flaws), whole)
    assert not flaws


def test_jpegs_that_lack_pixels_are_refused():
    large = encoded(PHOTO.repeat(20, 0).repeat(20, 1), "JPEG")
    for cut in (len(large) // 2, len(large) - 40):
        with pytest.raises(ImageError, match="truncated"):
            decode_image(large[:cut], "x")
        with pytest.raises(ImageError, match="premature end"):
            decode_image(large[:cut] + b"\xff\xd9", "x")


def test_photographs_are_read_in_spite_of_flaws_which_are_logged(tmp_path, caplog):
    contents = {
        "a.jpg": (JPEG[:-2], "no end mark"),
        "b.png": (encoded(PHOTO, "PNG", exif=b"Exif\0\0XXgarbage"), "EXIF data"),
        "c.webp": (encoded(PHOTO, "WEBP", exif=b"Exif\0\0XXgarbage"), "EXIF data"),
    }
    for name, (content, flaw) in contents.items():
        (tmp_path / name).write_bytes(content)
        caplog.clear()
        assert read_photo(tmp_path / name).shape == PHOTO.shape
        assert [flaw in record.getMessage() for record in caplog.records] == [True]
    (tmp_path / "d.jpg").write_bytes(encoded(PHOTO, "JPEG", orientation=6))
    assert read_photo(tmp_path / "d.jpg").shape == (13, 9, 3)
    assert read_photo(tmp_path / "d.jpg", exif="stored").shape == PHOTO.shape
    for name in (*contents, "d.jpg"):
        with pytest.raises(ImageError, match="--max-pixels"):
            read_photo(tmp_path / name, max_pixels=100)


@pytest.mark.parametrize("length", [2, 3, 20, 100, 170])
def test_jpegs_cut_off_in_their_header_say_so(length):
    with pytest.raises(ImageError, match="truncated, or its header is damaged"):
        decode_image(JPEG[:length], "x")


def test_colours_come_without_words():
    indexed = PIL.Image.fromarray(PHOTO).quantize(16)
    wanted = np.asarray(indexed.convert("RGB"))
    contents = [
        encoded(indexed, "PNG", transparency=bytes(range(16))),
        encoded(indexed, "PNG", transparency=3),
        encoded(indexed, "GIF"),
    ]
    frames = [PIL.Image.fromarray(PHOTO), PIL.Image.fromarray(255 - PHOTO)]
    moving = [encoded(frames[0], k, save_all=True, append_images=frames[1:], lossless=True) for k in ("WEBP", "PNG")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for content in contents:
            flaws = []
            assert np.array_equal(decode_image(content, "x", flaws=flaws), wanted)
            assert not flaws
        for content in moving:
            assert np.array_equal(decode_image(content, "x"), PHOTO)
    inks = encoded(PIL.Image.fromarray(PHOTO).convert("CMYK"), "JPEG", quality=100)
    assert (
        np.abs(decode_image(inks, "x").astype(int) - np.asarray(PIL.Image.open(io.BytesIO(inks)).convert("RGB"))).max()
        < 3
    )


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_the_callers_to_apply_whatever_pillow_does(kind, orientation):
    options = {"lossless": True} if kind == "WEBP" else {}
    content = encoded(PHOTO, kind, orientation=orientation, **options)
    plain = decode_image(encoded(PHOTO, kind, **options), "x")
    facts = image_facts(content, "x")
    assert (facts.orientation, facts.stored_size_px) == (orientation, (9, 13))
    assert np.array_equal(decode_image(content, "x"), plain)
    upright = decode_image(content, "x", orientation=orientation)
    assert upright.shape[:2] == facts.upright_size_px
    assert upright.flags.c_contiguous
    tagged = PIL.Image.fromarray(plain)
    tagged.getexif()[0x0112] = orientation
    assert np.array_equal(upright, np.asarray(PIL.ImageOps.exif_transpose(tagged)))
    assert np.array_equal(upright, turned(plain, orientation))
    assert oriented_size((9, 13), orientation) == upright.shape[:2]


def test_compressed_tiffs_are_turned_no_more_than_others():
    for compression, orientation in itertools.product(("tiff_lzw", "tiff_adobe_deflate"), (3, 6)):
        content = encoded(PHOTO, "TIFF", orientation=orientation, compression=compression)
        assert np.array_equal(decode_image(content, "x"), PHOTO)
        assert np.array_equal(decode_map(encoded(PHOTO[..., 0], "TIFF", orientation=orientation), "x"), PHOTO[..., 0])


def test_exif_data_that_cannot_be_read_are_a_flaw():
    content = encoded(PHOTO, "PNG", exif=b"Exif\0\0XXgarbage")
    facts = image_facts(content, "x")
    assert facts.orientation == 1
    assert "EXIF" in facts.flaw
    assert np.array_equal(decode_image(content, "x"), PHOTO)
    for unknown, is_flaw in ((0, False), (9, True)):
        facts = image_facts(encoded(PHOTO, "JPEG", orientation=unknown), "x")
        assert facts.orientation == 1
        assert bool(facts.flaw) == is_flaw


@pytest.mark.parametrize(
    ("exif", "size_px", "number", "is_guess", "is_left"),
    [
        ("apply", None, 6, False, False),
        ("apply", (9, 13), 6, False, False),
        ("stored", (13, 9), 1, False, True),
        ("auto", (9, 13), 1, False, True),
        ("auto", (13, 9), 6, False, False),
        ("auto", None, 6, True, False),
        ("auto", (5, 5), 6, True, False),
    ],
)
def test_sizes_in_the_annotations_decide_where_they_can(exif, size_px, number, is_guess, is_left):
    facts = image_facts(encoded(PHOTO, "JPEG", orientation=6), "x")
    found = resolve_orientation(facts, exif, size_px)
    assert (found.number, found.is_guess, found.is_left) == (number, is_guess, is_left)
    half_turn = image_facts(encoded(PHOTO, "JPEG", orientation=3), "x")
    assert resolve_orientation(half_turn, "auto", (9, 13)).is_guess
    assert not resolve_orientation(image_facts(JPEG, "x"), exif, size_px).is_guess


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_maps_of_few_bits_hold_the_numbers_of_their_file(bits):
    numbers = np.random.default_rng(bits).integers(0, 2**bits, (6, 11))
    grey = b"P5\n11 6\n%d\n" % (2**bits - 1) + numbers.astype(np.uint8).tobytes()
    text = b"P2\n11 6\n%d\n" % (2**bits - 1) + b" ".join(b"%d" % number for number in numbers.ravel())
    contents = [png_of_bits(numbers, bits), png_of_bits(numbers, bits, palette=True), grey, text]
    contents += [tiff_of_bits(numbers, bits, white_is_zero=white) for white in (False, True)]
    if bits == 1:
        contents.append(b"P1\n11 6\n" + b" ".join(b"%d" % number for number in numbers.ravel()))
    for content in contents:
        found = decode_map(content, "x")
        assert found.dtype == np.uint8
        assert np.array_equal(found, numbers), content[:12]


def test_maps_of_many_bits_are_whole_and_lossy_ones_none():
    numbers = np.random.default_rng(0).integers(0, 60_000, (6, 9)).astype(np.uint16)
    for kind in ("PNG", "TIFF"):
        assert np.array_equal(decode_map(encoded(numbers, kind), "x"), numbers)
    with pytest.raises(ImageError, match="JPEG, which changes its numbers"):
        decode_map(encoded(PHOTO[..., 0], "JPEG"), "x")
    with pytest.raises(ImageError, match="mode RGB"):
        decode_map(encoded(PHOTO, "PNG"), "x")


def test_files_that_are_not_there_are_the_same_kind_of_error(tmp_path):
    for path in (tmp_path / "absent.jpg", tmp_path, tmp_path / ("x" * 300), tmp_path / "a\0b"):
        with pytest.raises(ImageError, match="cannot be read") as caught:
            read_file(path)
        assert "\n" not in caught.value.line
    assert isinstance(pickle.loads(pickle.dumps(caught.value)), ImageError)
