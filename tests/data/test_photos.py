"""What a user names to be looked at comes in order; what cannot be read comes in its place."""

import cv2
import numpy as np
import pytest
from PIL import Image

from piip_scale.data.images import ImageError
from piip_scale.data.photos import Reading, find_photos


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    for name in ("b.PNG", "a[1].jpg", "deep/c.webp", ".hidden.png"):
        Image.new("RGB", (8, 6), (200, 10, 10)).save(tmp_path / "in" / name)
    (tmp_path / "in" / "notes.txt").write_text("none")
    writer = cv2.VideoWriter(str(tmp_path / "clip.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 5, (32, 16))
    for shade in range(0, 200, 40):
        writer.write(np.full((16, 32, 3), (shade, 0, 0), np.uint8))
    writer.release()
    return tmp_path


def names(*words, listed=(), **reading):
    return [photo.name for photo in find_photos(words, Reading(**reading), listed)]


def test_files_folders_patterns_and_lists_come_in_order(folder):
    images = ["in/a[1].jpg", "in/b.PNG", "in/deep/c.webp"]
    assert names("in") == images
    assert names("in/b.PNG", "in/a[1].jpg") == ["in/b.PNG", "in/a[1].jpg"]
    assert names("in/*.PNG", "**/c.*") == ["in/b.PNG", "in/deep/c.webp"]
    assert names("-", "in/b.PNG", listed=["in/b.PNG\n", "\n", "in/deep\r\n"]) == [images[1], images[2], images[1]]
    assert next(find_photos(["in/b.PNG"], Reading())).read().shape == (6, 8, 3)


def test_frames_of_a_video_are_numbered_and_in_colour(folder):
    photos = list(find_photos(["clip.avi"], Reading(every=2)))
    assert [photo.name for photo in photos] == ["clip.avi#0", "clip.avi#2", "clip.avi#4"]
    assert [photo.stem for photo in photos] == ["clip_000000", "clip_000002", "clip_000004"]
    red, _, blue = photos[2].read().mean((0, 1))
    assert red < 20 < 140 < blue


@pytest.mark.parametrize(
    ("word", "part"),
    [
        ("absent.jpg", "absent.jpg"),
        ("in/*.gif", r"in/\*\.gif"),
        ("empty", "holds no images"),
        ("absent.mp4", "no such file"),
        ("text.mp4", "of no format|no frame"),
        ("in/notes.txt", "notes.txt"),
    ],
)
def test_what_cannot_be_read_says_so_when_it_is_read(folder, word, part):
    (folder / "text.mp4").write_text("no video")
    (photo,) = find_photos([word], Reading())
    with pytest.raises(ImageError, match=part):
        photo.read()


def test_a_video_of_too_many_pixels_is_not_decoded(folder):
    (photo,) = find_photos(["clip.avi"], Reading(max_pixels=100))
    with pytest.raises(ImageError, match=r"32 x 16 px.*--max-pixels"):
        photo.read()
