"""What is hidden while something else is imported is there again afterwards."""

import importlib
import importlib.util
import sys

import pytest

from piip_scale.tasks.absent import absent


@pytest.fixture
def optional(tmp_path, monkeypatch):
    (tmp_path / "optional_library.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    yield "optional_library"
    sys.modules.pop("optional_library", None)


def test_a_module_is_not_installed_inside_and_is_after(optional):
    with absent(optional, "json"):
        assert importlib.util.find_spec(optional) is None
        with pytest.raises(ImportError):
            importlib.import_module(optional)
        assert importlib.import_module("json").loads("1") == 1
    assert importlib.import_module(optional).__name__ == optional


def test_an_error_leaves_nothing_hidden(optional):
    with pytest.raises(ValueError, match="inside"), absent(optional):
        raise ValueError("inside")
    assert importlib.import_module(optional).__name__ == optional
