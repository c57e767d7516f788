import ast
import subprocess
import sys
from pathlib import Path

import layer_rules as rules
import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "piip_scale"


def module_name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def sources(folder):
    return sorted(path for path in (ROOT / folder).rglob("*.py") if "__pycache__" not in path.parts)


def check_tree(check, folder):
    faults = []
    for path in sources(folder):
        faults += check(ast.parse(path.read_text(encoding="utf-8")), module_name(path))
    return faults


def test_there_is_something_to_check():
    parts = {module_name(path).split(".")[1] for path in sources("piip_scale") if path.parent != PACKAGE}
    assert parts <= rules.LAYERS.keys()
    assert len(parts) >= 9
    for wall in (rules.WALLS, rules.HEAVY):
        for home in {home for homes in wall.values() for home in homes}:
            path = PACKAGE / home.replace(".", "/")
            assert path.is_dir() or path.with_suffix(".py").is_file(), f"{home} is no module any more"


@pytest.mark.parametrize(
    "check",
    [rules.layer_faults, rules.wall_faults, rules.inside_faults, rules.rank_faults, rules.exception_faults],
    ids=lambda c: c.__name__,
)
def test_the_package_keeps_the_rules(check):
    assert check_tree(check, "piip_scale") == []


@pytest.mark.parametrize("folder", ["piip_scale", "tests", "tools", "configs", "benchmarks", "launch"])
def test_files_are_short_and_swallow_nothing(folder):
    texts = {path: path.read_text(encoding="utf-8") for path in sources(folder)}
    faults = [fault for path, text in texts.items() for fault in rules.size_faults(text, module_name(path))]
    assert faults + check_tree(rules.exception_faults, folder) == []


def test_tools_are_thin():
    faults = []
    for path in sources("tools"):
        text = path.read_text(encoding="utf-8")
        faults += rules.tool_faults(ast.parse(text), text, path.name)
    assert faults == []


def test_configs_are_values():
    assert check_tree(rules.config_faults, "configs") == []


def test_help_does_not_wait_for_training_libraries():
    """What the layers promise, seen: the command's own imports leave the slow libraries alone."""
    code = (
        "import sys; import piip_scale.cli.app;"
        "print([n for n in ('deepspeed', 'mmdet', 'mmengine', 'tensorboard', 'timm', 'sklearn') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=True)
    assert done.stdout.strip() == "[]"


def faults_of(check, module, source):
    return list(check(ast.parse(source), module))


@pytest.mark.parametrize(
    ("check", "module", "source", "fault"),
    [
        (rules.layer_faults, "piip_scale.ops.a", "import piip_scale.models.vit", "piip_scale.models.vit (layer 2)"),
        (rules.layer_faults, "piip_scale.ops.a", "from piip_scale import models", "piip_scale.models (layer 2)"),
        (rules.layer_faults, "piip_scale.models.a", "from ..data import batch", "piip_scale.data.batch (layer 2)"),
        (rules.layer_faults, "piip_scale.data.a", "def f():\n    from piip_scale.engine.x import y", "a:2 (layer 2)"),
        (
            rules.layer_faults,
            "piip_scale.engine.a",
            "from piip_scale.tasks.detection.task import D",
            "tasks.detection.task.D",
        ),
        (rules.layer_faults, "piip_scale.world", "import importlib\nimportlib.import_module('piip_scale.cli')", "cli"),
        (rules.layer_faults, "piip_scale.new.a", "import piip_scale.errors", "is in no layer"),
        (
            rules.wall_faults,
            "piip_scale.tasks.a",
            "def f():\n    import deepspeed.ops",
            "belongs to engine.zero.deepspeed_api",
        ),
        (rules.wall_faults, "piip_scale.engine.zero.deepspeed_api", "import deepspeed", "deepspeed at import time"),
        (rules.wall_faults, "piip_scale.engine.a", "if TYPE_CHECKING:\n    from deepspeed import E", "belongs to"),
        (rules.inside_faults, "piip_scale.engine.a", "x = p.ds_tensor", "touches DeepSpeed's ds_tensor"),
        (rules.wall_faults, "piip_scale.models.a", "def f():\n    from mmdet.models import x", "belongs to tasks"),
        (rules.wall_faults, "piip_scale.config.model", "def f():\n    import mmengine", "tasks, config.loading"),
        (rules.wall_faults, "piip_scale.telemetry.a", "from torch.utils.tensorboard import S", "at import time"),
        (rules.wall_faults, "piip_scale.models.a", "class A:\n    import timm", "timm at import time"),
        (rules.rank_faults, "piip_scale.engine.a", "import os\nos.environ['SLURM_PROCID']", "names SLURM_PROCID"),
        (rules.rank_faults, "piip_scale.data.a", "x = {'RANK': 1}", "names RANK"),
        (rules.rank_faults, "piip_scale.cli.a", "x = '#SBATCH -N2'", "belongs to launch"),
        (rules.rank_faults, "piip_scale.cli.a", "x = f'srun -n {2} train'", "belongs to launch"),
        (rules.exception_faults, "piip_scale.a", "try:\n    f()\nexcept:\n    raise", "swallows every error"),
        (rules.exception_faults, "piip_scale.a", "try:\n    f()\nexcept (A, Exception):\n    pass", "swallows"),
        (rules.config_faults, "configs.a", "import os", "more than a value: import os"),
        (rules.config_faults, "configs.a", "for i in range(3):\n    x = i", "more than a value"),
        (rules.config_faults, "configs.a", "x = open('y').read()", "calls open"),
    ],
)
def test_the_checks_find_what_they_are_for(check, module, source, fault):
    found = faults_of(check, module, source)
    assert found
    assert fault in found[0]


@pytest.mark.parametrize(
    ("check", "module", "source"),
    [
        (rules.layer_faults, "piip_scale.engine.a", "from piip_scale.tasks.base import Task"),
        (rules.layer_faults, "piip_scale.engine.a", "from piip_scale import __version__, telemetry"),
        (rules.layer_faults, "piip_scale.cli.a", "import piip_scale.engine.trainer, piip_scale.errors"),
        (rules.layer_faults, "piip_scale.models.a", "from .vit import Vit\nimport torch.data.models"),
        (rules.wall_faults, "piip_scale.engine.zero.deepspeed_api", "def f():\n    import deepspeed"),
        (rules.inside_faults, "piip_scale.engine.zero.a", "x = p.ds_tensor"),
        (rules.wall_faults, "piip_scale.models.a", "import mmdetection_of_others"),
        (rules.rank_faults, "piip_scale.world", "x = env['RANK']"),
        (rules.rank_faults, "piip_scale.cli.a", '"""RANK"""\nx = "rank of the srun step"'),
        (rules.exception_faults, "piip_scale.a", "try:\n    f()\nexcept OSError:\n    pass"),
        (rules.config_faults, "configs.a", '"""Doc."""\n_base_ = ["b.py"]\nmodel = dict(scales=(1.0, -2.0))'),
    ],
)
def test_the_checks_let_the_rest_pass(check, module, source):
    assert faults_of(check, module, source) == []


def test_sizes_and_tools():
    assert list(rules.size_faults("x = 1\n" * 399, "a")) == []
    assert list(rules.size_faults("x = 1\n" * 400, "a")) == ["a has 400 lines; under 400"]
    good = "from piip_scale.cli.main import main\nmain()\n"
    assert list(rules.tool_faults(ast.parse(good), good, "t.py")) == []
    for bad, fault in [
        (good + "x = 1\n" * 60, "longer than 60"),
        (good + "class A: pass\n", "defines a class"),
        ("import os\n", "does not use the package"),
    ]:
        assert any(fault in found for found in rules.tool_faults(ast.parse(bad), bad, "t.py"))
