"""Folders whose content is trusted or run: somebody else's, links and open ones in their place are refused."""

import os
import tempfile
from pathlib import Path

import pytest

from piip_scale.data.reading.cache import cache_folder
from piip_scale.errors import DataError, KernelError, PiipError, RunError
from piip_scale.files import named_folder, private_folder, temporary_folder
from piip_scale.ops.fused import check_triton_cache

MAKERS = (private_folder, named_folder)


@pytest.fixture
def shared(tmp_path):
    """A folder like /tmp: everybody writes, nobody moves another's files."""
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o1777)
    return folder


@pytest.fixture
def owned_by(monkeypatch):
    """Makes the file system say that paths belong to another user, whoever runs the tests."""
    real = {name: getattr(Path, name) for name in ("stat", "lstat")}

    def claim(*paths):
        def looking(name):
            def look(path, **options):
                state = real[name](path, **options)
                if Path(os.path.abspath(path)) not in paths:
                    return state
                return os.stat_result((*state[:4], os.getuid() + 1, *state[5:]))

            return look

        for name in real:
            monkeypatch.setattr(Path, name, looking(name))

    return claim


@pytest.mark.parametrize("make", MAKERS)
def test_a_new_folder_is_the_users_alone(shared, make):
    folder = make(shared / "a" / "b", RunError, fix="")
    assert folder.stat().st_mode & 0o777 == 0o700
    assert make(folder, RunError, fix="") == folder


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("foreign", ["a", "a/b"])
def test_what_somebody_else_made_first_is_refused(shared, owned_by, make, foreign):
    (shared / "a").mkdir()
    (shared / "a" / "b").mkdir()
    owned_by(shared / foreign)
    if make is named_folder and foreign == "a/b":
        # Below a folder that is not open to everybody, whom to trust is the user's to choose.
        make(shared / "a" / "b", RunError, fix="")
        return
    with pytest.raises(RunError, match=r"belongs to another user.*do this") as caught:
        make(shared / "a" / "b", RunError, fix="do this")
    assert "\n" not in caught.value.line


@pytest.mark.parametrize("make", MAKERS)
def test_a_link_that_somebody_else_put_there_is_refused(shared, owned_by, make, tmp_path):
    (tmp_path / "target").mkdir(mode=0o700)
    (shared / "link").symlink_to(tmp_path / "target")
    owned_by(shared / "link")
    with pytest.raises(RunError, match="belongs to another user"):
        make(shared / "link", RunError, fix="")


@pytest.mark.parametrize("make", MAKERS)
def test_folders_that_everybody_can_write_are_refused(tmp_path, make):
    inner = tmp_path / "open" / "inner"
    inner.mkdir(parents=True)
    inner.chmod(0o777)
    with pytest.raises(RunError, match="can be written by others"):
        make(inner, RunError, fix="")
    inner.chmod(0o700)
    inner.parent.chmod(0o777)
    with pytest.raises(RunError, match="everybody can write"):
        make(inner, RunError, fix="")


def test_a_link_that_leads_nowhere_or_a_file_is_one_line(tmp_path):
    (tmp_path / "nowhere").symlink_to(tmp_path / "absent" / "deeper")
    (tmp_path / "file").write_text("")
    for name in ("nowhere", "file", "file/below"):
        with pytest.raises(RunError, match="cannot make folder") as caught:
            private_folder(tmp_path / name, RunError, fix="")
        assert "\n" not in caught.value.line


def test_the_nodes_cache_is_not_made_in_a_folder_of_another(shared, owned_by, monkeypatch):
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(shared))
    folder = cache_folder("auto")
    owned_by(folder)
    with pytest.raises(DataError, match=r"another user.*set data\.cache\.folder"):
        cache_folder("auto")


def test_kernels_are_not_run_from_an_open_folder(tmp_path, monkeypatch):
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton").chmod(0o777)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    check_triton_cache.cache_clear()
    with pytest.raises(KernelError, match="TRITON_CACHE_DIR"):
        check_triton_cache()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "own"))
    check_triton_cache()
    assert (tmp_path / "own").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("value", [None, "", "relative", "/absent/folder", "/proc", "a\nb"])
def test_any_setting_of_the_temporary_folder_gives_one(tmp_path, monkeypatch, value):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", None)
    if value is None:
        monkeypatch.delenv("TMPDIR", raising=False)
    else:
        monkeypatch.setenv("TMPDIR", value)
    folder = temporary_folder()
    assert folder.is_absolute()
    assert folder.is_dir()


def test_no_temporary_folder_at_all_is_one_line(monkeypatch):
    def none():
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    with pytest.raises(PiipError, match=r"no temporary folder.*set TMPDIR") as caught:
        cache_folder("auto")
    assert "\n" not in caught.value.line
