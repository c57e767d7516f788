"""Image files of any format decode to RGB; what does not is told in one line."""

import numpy as np
import pytest

from piip_scale.data.sample import decode_image
from piip_scale.errors import DataError


def test_other_image_formats_decode(tmp_path):
    import PIL.Image

    pixels = np.random.default_rng(0).integers(0, 255, (9, 13, 3), np.uint8)
    for suffix in ("png", "bmp", "webp", "tiff"):
        PIL.Image.fromarray(pixels).save(tmp_path / f"x.{suffix}", **({"lossless": True} if suffix == "webp" else {}))
        assert np.array_equal(decode_image((tmp_path / f"x.{suffix}").read_bytes(), "x"), pixels)
    PIL.Image.fromarray(pixels[..., 0]).save(tmp_path / "grey.png")
    assert np.array_equal(decode_image((tmp_path / "grey.png").read_bytes(), "x"), pixels[..., :1].repeat(3, 2))
    content = (tmp_path / "x.png").read_bytes()
    for broken in (content[: len(content) // 2], b"text", b""):
        with pytest.raises(DataError, match="cannot be decoded"):
            decode_image(broken, "x")
    PIL.Image.fromarray(pixels[..., 0].astype(np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(DataError, match="not 8-bit"):
        decode_image((tmp_path / "deep.png").read_bytes(), "x")


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "0 bytes in no format"), (b"not an image", "12 bytes in no format"), (None, "decompression bomb")],
)
def test_what_no_decoder_takes_is_one_line(tmp_path, monkeypatch, content, reason):
    import PIL.Image

    if content is None:
        PIL.Image.new("RGB", (64, 64)).save(tmp_path / "large.png")
        content = (tmp_path / "large.png").read_bytes()
        monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DataError, match=reason) as caught:
        decode_image(content, "x.png")
    assert "x.png" in caught.value.line
    assert "0x" not in caught.value.line
