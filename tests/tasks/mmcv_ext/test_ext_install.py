"""The stand-in is found last, names what it lacks, and leaves a compiled mmcv alone."""

import importlib
import subprocess
import sys
import textwrap
from functools import cache

import pytest

from piip_scale.errors import KernelError
from piip_scale.tasks import mmcv_ext


def _run(code, tmp_path=None):
    path = [] if tmp_path is None else [str(tmp_path)]
    prologue = f"import sys; sys.path[:0] = {path!r}\n"
    command = [sys.executable, "-W", "always", "-c", prologue + textwrap.dedent(code)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def _fake_mmcv(tmp_path, ext_source):
    package = tmp_path / "mmcv"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "_ext.py").write_text(ext_source)


def test_mmdet_imports_on_the_stand_in_and_nothing_says_nms_is_missing():
    done = _run("""
        from piip_scale.tasks import mmcv_ext
        mmcv_ext.install(); mmcv_ext.install()
        import mmdet.models, mmcv.ops
        from mmengine.utils.dl_utils import mmcv_full_available
        print(mmcv_ext.is_stand_in(), mmcv_full_available(), sum(type(f).__name__ == "_Finder" for f in sys.meta_path))
    """)
    assert done.stdout.splitlines()[-1] == "True True 1", done.stderr
    assert "nms" not in (done.stdout + done.stderr).lower()


def test_an_op_in_quarantine_says_so_once(monkeypatch):
    import torch

    install = importlib.import_module("piip_scale.tasks.mmcv_ext.install")
    said = []
    monkeypatch.setattr(install, "_announce", cache(said.append))
    op = install._announced("nms_match", install._UNMEASURED["nms_match"])
    for _ in range(2):
        assert op(torch.tensor([[0.0, 0, 4, 4, 0.9]]), 0.5) == [[0]]
    assert said == ["nms_match"]
    assert not install._OPS.keys() & install._UNMEASURED.keys()


def test_a_compiled_mmcv_is_used_as_it_is(tmp_path):
    _fake_mmcv(tmp_path, "compiled = True\n")
    done = _run(
        """
        from piip_scale.tasks import mmcv_ext
        mmcv_ext.install()
        import mmcv._ext
        print(mmcv._ext.compiled, mmcv_ext.is_stand_in(), hasattr(mmcv._ext, "nms"))
        """,
        tmp_path,
    )
    assert done.stdout.split() == ["True", "False", "False"], done.stderr


def test_a_compiled_mmcv_that_does_not_load_is_said_in_one_line(tmp_path):
    _fake_mmcv(tmp_path, "raise ImportError('undefined symbol: _ZN3c10')\n")
    done = _run(
        """
        from piip_scale.errors import KernelError
        from piip_scale.tasks import mmcv_ext
        try:
            mmcv_ext.install()
        except KernelError as error:
            print(error)
        """,
        tmp_path,
    )
    assert "undefined symbol" in done.stdout, done.stderr
    assert len(done.stdout.splitlines()) == 1


def test_an_absent_op_fails_when_called_and_names_itself():
    mmcv_ext.install()
    import mmcv._ext

    op = mmcv._ext.carafe_forward
    with pytest.raises(KernelError, match="carafe_forward"):
        op(1, 2)
    with pytest.raises(AttributeError):
        _ = mmcv._ext.__path__
