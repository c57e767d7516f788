"""Photographs outside shards."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from piip_scale.data.images import read_photo
from piip_scale.errors import DataError

ORIENTATION = 274


@pytest.mark.parametrize(("orientation", "turned"), [(1, None), (3, 180), (6, 90), (8, 270)])
def test_a_turned_photograph_is_read_upright(tmp_path, orientation, turned):
    upright = np.zeros((48, 80, 3), np.uint8)
    upright[:24, :40] = (250, 30, 30)
    upright[24:, 40:] = (30, 30, 250)
    # A camera stores the picture turned the other way round and says by how much.
    stored = Image.fromarray(upright) if turned is None else Image.fromarray(upright).rotate(turned, expand=True)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stored.save(tmp_path / "photo.jpg", quality=95, exif=exif)
    assert np.abs(read_photo(tmp_path / "photo.jpg").astype(int) - upright).mean() < 3


def test_what_is_no_image_is_one_line(tmp_path):
    (tmp_path / "photo.jpg").write_text("hello")
    for name in ("photo.jpg", "absent.jpg"):
        with pytest.raises(DataError, match=name):
            read_photo(tmp_path / name)
