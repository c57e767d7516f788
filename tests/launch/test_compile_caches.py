from __future__ import annotations

import os

import pytest

from piip_scale.errors import ConfigError, RunError
from piip_scale.launch.compile_caches import LOCAL_CACHE, use_local_cache
from piip_scale.launch.profiles import load_profile


def test_without_one_nothing_is_made_or_set():
    environment = {}
    assert use_local_cache(environment) is None
    assert environment == {}


def test_what_is_compiled_lies_in_a_folder_of_the_users_own(tmp_path):
    environment = {LOCAL_CACHE: str(tmp_path), "TORCH_EXTENSIONS_DIR": "/mine"}
    folder = use_local_cache(environment)
    assert environment["TRITON_CACHE_DIR"] == str(folder / "triton")
    assert environment["TORCH_EXTENSIONS_DIR"] == "/mine"
    for path in (folder, folder / "triton", folder / "inductor"):
        assert (path.stat().st_mode & 0o777, path.stat().st_uid) == (0o700, os.getuid())
    assert use_local_cache(dict(environment)) == folder


@pytest.mark.parametrize("attack", ["open", "link", "inner"])
def test_one_that_somebody_else_may_have_made_is_refused(tmp_path, attack):
    folder = tmp_path / f"piip_scale_compiled_{os.getuid()}"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    elsewhere.chmod(0o777)
    if attack == "open":
        folder.mkdir()
        folder.chmod(0o777)
    elif attack == "link":
        folder.symlink_to(elsewhere)
    else:
        folder.mkdir(mode=0o700)
        (folder / "triton").symlink_to(elsewhere)
    with pytest.raises(RunError) as caught:
        use_local_cache({LOCAL_CACHE: str(tmp_path)})
    assert "\n" not in caught.value.line


def test_a_profile_names_it_by_its_whole_path(tmp_path):
    path = tmp_path / "site.toml"
    path.write_text('local_cache = "tmp"\n')
    with pytest.raises(ConfigError, match="whole path"):
        load_profile(str(path))
