import errno
import os

import pytest

from piip_scale.errors import CheckpointError, RunError
from piip_scale.files import disk_errors, write_text_atomically


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_refused_write_leaves_the_old_text_and_no_rubbish(tmp_path, monkeypatch, call):
    path = tmp_path / "status"
    write_text_atomically(path, "old")

    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(OSError, match="No space left"):
        write_text_atomically(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    write_text_atomically(path, "new ü")
    assert path.read_text(encoding="utf-8") == "new ü"


def test_a_folder_may_be_renamed_as_soon_as_the_file_has_its_name(tmp_path, monkeypatch):
    """As rank 0 renames a checkpoint's once the last rank's mark is there."""
    replace, folder = os.replace, tmp_path / "staging"

    def replace_and_rename(part, path):
        replace(part, path)
        folder.rename(tmp_path / "step_1")

    monkeypatch.setattr(os, "replace", replace_and_rename)
    write_text_atomically(folder / "mark", "done")
    assert [file.name for file in (tmp_path / "step_1").iterdir()] == ["mark"]


def test_only_a_file_is_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for name, reason in (("pipe", "not a regular file"), ("link", "not a regular file"), ("folder", "Is a directory")):
        with pytest.raises(OSError, match=reason):
            write_text_atomically(tmp_path / name, "text")
    assert (tmp_path / "pipe").is_fifo()
    assert (tmp_path / "link").is_symlink()
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize(
    ("code", "line"),
    [
        (errno.ENOSPC, "cannot save x: No space left on device (/a/b); free some space on that disk, then start again"),
        (errno.EROFS, "cannot save x: Read-only file system (/a/b); choose a folder on a disk that can be written"),
        (errno.EIO, "cannot save x: Input/output error (/a/b)"),
    ],
)
def test_a_refusal_of_the_disk_is_one_line_with_a_fix(code, line):
    with pytest.raises(CheckpointError) as caught, disk_errors(CheckpointError, "save x"):
        raise OSError(code, os.strerror(code), "/a/b")
    assert caught.value.line == line
    assert isinstance(caught.value.__cause__, OSError)


def test_other_errors_pass():
    with pytest.raises(ZeroDivisionError), disk_errors(RunError, "save x"):
        raise ZeroDivisionError
