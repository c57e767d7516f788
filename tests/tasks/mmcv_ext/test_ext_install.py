"""The stand-in is found last, names what it lacks, and leaves a compiled mmcv alone."""

import importlib
import json
import subprocess
import sys
import textwrap
from functools import cache

import pytest

from piip_scale.errors import KernelError
from piip_scale.tasks import mmcv_ext

# Each in a process forked from one that has torch, and nothing of mmcv yet.
CASES = {
    "stand-in": """
        mmcv_ext.install(); mmcv_ext.install()
        import mmdet.models, mmcv.ops
        from mmengine.utils.dl_utils import mmcv_full_available
        print(mmcv_ext.is_stand_in(), mmcv_full_available(), sum(type(f).__name__ == "_Finder" for f in sys.meta_path))
        """,
    "compiled": """
        mmcv_ext.install()
        import mmcv._ext
        print(mmcv._ext.compiled, mmcv_ext.is_stand_in(), hasattr(mmcv._ext, "nms"))
        """,
    "compiled for another torch": """
        from piip_scale.errors import KernelError
        try:
            mmcv_ext.install()
        except KernelError as error:
            print(error)
        """,
}
FAKE_MMCV = {
    "compiled": "compiled = True\n",
    "compiled for another torch": "raise ImportError('undefined symbol: _ZN3c10')\n",
}
RUN = """
import json, os, sys
from piip_scale.tasks import mmcv_ext

assert "mmcv" not in sys.modules
for code, path, output in json.loads(sys.argv[1]):
    if not os.fork():
        # An exception ends the process as any, with its traceback in the output.
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT), 1)
        os.dup2(1, 2)
        sys.path[:0] = path
        exec(code)
        sys.exit()
    os.wait()
"""


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """What each case printed and logged."""
    folder = tmp_path_factory.mktemp("cases")
    for name, source in FAKE_MMCV.items():
        package = folder / name / "mmcv"
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        (package / "_ext.py").write_text(source)
    jobs = [
        (textwrap.dedent(code), [str(folder / name)] if name in FAKE_MMCV else [], str(folder / f"{name}.txt"))
        for name, code in CASES.items()
    ]
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", RUN, json.dumps(jobs)], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return {name: (folder / f"{name}.txt").read_text() for name in CASES}


def test_mmdet_imports_on_the_stand_in_and_nothing_says_nms_is_missing(outputs):
    assert outputs["stand-in"].splitlines()[-1] == "True True 1", outputs["stand-in"]
    assert "nms" not in outputs["stand-in"].lower()


def test_a_compiled_mmcv_is_used_as_it_is(outputs):
    assert outputs["compiled"].split() == ["True", "False", "False"]


def test_a_compiled_mmcv_that_does_not_load_is_said_in_one_line(outputs):
    assert "undefined symbol" in outputs["compiled for another torch"]
    assert len(outputs["compiled for another torch"].splitlines()) == 1


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


def test_an_absent_op_fails_when_called_and_names_itself():
    mmcv_ext.install()
    import mmcv._ext

    op = mmcv._ext.carafe_forward
    with pytest.raises(KernelError, match="carafe_forward"):
        op(1, 2)
    with pytest.raises(AttributeError):
        _ = mmcv._ext.__path__
