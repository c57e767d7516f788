"""The architecture as data, and the checks that read a source against it; test_layers.py applies them."""

import ast
import re
from dataclasses import dataclass

# Layer of each part of the package: a part imports parts of lower layers, and itself.
LAYERS = {
    "text": 0,
    "errors": 0,
    "files": 0,
    "logging": 0,
    "registry": 0,
    "geometry": 0,
    "config": 0,
    "pages": 1,
    "agreement": 1,
    "world": 1,
    "ops": 1,
    "models": 2,
    "data": 2,
    "checkpoint": 2,
    "run": 2,
    "tasks": 3,
    "engine": 3,
    "telemetry": 3,
    "demo": 3,
    "launch": 4,
    "serving": 4,
    "cli": 4,
    # What `import piip_scale` offers; it imports nothing before it is asked.
    "__init__": 5,
}
# Modules that a part may import within its own layer.
WITHIN_LAYER = {
    "errors": ("text",),
    "logging": ("errors",),
    "files": ("errors",),
    "config": ("errors", "geometry", "logging", "registry"),
    "registry": ("errors",),
    "ops": ("world",),
    "engine": ("tasks.base", "telemetry"),
    "cli": ("launch", "serving"),
}
# Third-party packages that only some modules may import at all.
WALLS = {
    "deepspeed": ("engine.zero.deepspeed_api",),
    "mmdet": ("tasks",),
    "mmseg": ("tasks",),
    "mmcv": ("tasks",),
    "mmengine": ("tasks", "config.loading"),
    "webdataset": ("data",),
    "fsspec": ("data.reading.sources",),
    "aiohttp": ("data.reading.sources",),
    "tensorboard": ("telemetry",),
    "wandb": ("telemetry",),
    "mlflow": ("telemetry",),
    "typer": ("cli",),
    "rich": ("telemetry", "cli"),
    "fastapi": ("serving",),
    "starlette": ("serving",),
    "prometheus_client": ("serving",),
    "uvicorn": ("cli.serve",),
}
# Slow to import: only inside functions, but for modules whose very purpose they are.
HEAVY = {
    "deepspeed": (),
    "mmdet": ("tasks.mmlab",),
    "mmseg": ("tasks.segmentation.mmlab",),
    "mmcv": ("tasks.mmlab",),
    "mmengine": ("tasks.mmlab", "tasks.segmentation.mmlab"),
    "webdataset": (),
    "fsspec": (),
    "aiohttp": (),
    "tensorboard": (),
    "torch.utils.tensorboard": (),
    "wandb": (),
    "mlflow": (),
    "timm": (),
    "sklearn": (),
    "scipy": (),
    "matplotlib": (),
    "faster_coco_eval": (),
    "torchvision": ("tasks", "ops"),
    "cv2": ("data", "demo", "tasks"),
}
# Names of the environment that a single module reads or writes.
RANK_VARIABLES = re.compile(r"RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|GROUP_RANK|MASTER_ADDR|MASTER_PORT|SLURM_\w+")
RANK_READER = "world"
SLURM_PART = "launch"
SLURM_COMMANDS = re.compile(r"#SBATCH|\b(sbatch|srun|scontrol|squeue|scancel)\s+-")

# DeepSpeed's own attributes of parameters, optimisers and engines: touched in one room.
DEEPSPEED_INSIDES = re.compile(
    r"ds_\w+|_hp_mapping|parameter_offload|micro_steps|param_names|persistent_parameters|nvme_swapper"
    r"|fp16_\w*groups\w*|fp32_\w*groups\w*|bit16_groups|checkpoint_event_\w+|partition_numel|update_lp_params"
)
DEEPSPEED_ROOM = "engine.zero"

MAX_FILE_LINES = 400
MAX_TOOL_LINES = 60
CONFIG_NODES = (ast.Assign, ast.AnnAssign)


@dataclass(frozen=True)
class Import:
    """One imported module by its absolute dotted name."""

    name: str
    line: int
    at_import_time: bool


def imports(tree, module):
    """Every import of a parsed module, those inside functions and by a literal ``import_module`` too."""
    found = []

    def visit(node, at_import_time):
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, node.lineno, at_import_time) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node, module)
            # `from piip_scale import world` names a module; `from piip_scale.world import World` does not.
            found.extend(Import(f"{base}.{alias.name}", node.lineno, at_import_time) for alias in node.names)
        elif isinstance(node, ast.Call) and _is_import_call(node):
            found.append(Import(node.args[0].value, node.lineno, at_import_time))
        lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or _is_type_checking(node)
        for child in ast.iter_child_nodes(node):
            visit(child, at_import_time and not lazy)

    visit(tree, at_import_time=True)
    return found


def _absolute(node, module):
    if not node.level:
        return node.module
    parents = module.split(".")[: -node.level]
    return ".".join([*parents, *([node.module] if node.module else [])])


def _is_import_call(node):
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    literal = node.args and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str)
    return name in ("import_module", "__import__") and bool(literal)


def _is_type_checking(node):
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def _inside(name, homes):
    return any(name == home or name.startswith(f"{home}.") for home in homes)


def layer_faults(tree, module):
    """Imports that go upward or sideways. ``module`` is dotted, ``piip_scale.engine.trainer``."""
    own = module.removeprefix("piip_scale").removeprefix(".")
    part = own.split(".")[0]
    for imported in imports(tree, module):
        inner = imported.name.removeprefix("piip_scale.")
        other = inner.split(".")[0]
        if not imported.name.startswith("piip_scale.") or other not in LAYERS or other == part:
            continue
        if part not in LAYERS:
            yield f"{module}:{imported.line} is in no layer and imports {imported.name}"
        elif LAYERS[other] >= LAYERS[part] and not _inside(inner, WITHIN_LAYER.get(part, ())):
            yield f"{module}:{imported.line} (layer {LAYERS[part]}) imports {imported.name} (layer {LAYERS[other]})"


def wall_faults(tree, module):
    """Third-party packages outside their walls, or imported where that makes everybody wait."""
    own = module.removeprefix("piip_scale.")
    for imported in imports(tree, module):
        for package, homes in WALLS.items():
            if _inside(imported.name, [package]) and not _inside(own, homes):
                yield f"{module}:{imported.line} imports {package}, which belongs to {', '.join(homes)}"
        for package, homes in HEAVY.items():
            if imported.at_import_time and _inside(imported.name, [package]) and not _inside(own, homes):
                yield f"{module}:{imported.line} imports {package} at import time"


def inside_faults(tree, module):
    """What DeepSpeed keeps for itself, touched outside the one room for it."""
    if _inside(module.removeprefix("piip_scale."), [DEEPSPEED_ROOM]):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and DEEPSPEED_INSIDES.fullmatch(node.attr):
            yield f"{module}:{node.lineno} touches DeepSpeed's {node.attr}, which belongs to {DEEPSPEED_ROOM}"


def rank_faults(tree, module):
    """Rank variables outside ``world``, and Slurm commands outside ``launch``."""
    documented = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Constant) or not isinstance(node.value, str) or id(node) in documented:
            continue
        if RANK_VARIABLES.fullmatch(node.value) and module != f"piip_scale.{RANK_READER}":
            yield f"{module}:{node.lineno} names {node.value}, which only {RANK_READER} reads"
        if SLURM_COMMANDS.search(node.value) and not module.startswith(f"piip_scale.{SLURM_PART}."):
            yield f"{module}:{node.lineno} holds Slurm text, which belongs to launch/"


def exception_faults(tree, module):
    """Bare excepts, and excepts that hide everything without a word."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.ExceptHandler):
            continue
        silent = all(isinstance(child, ast.Pass | ast.Continue) for child in node.body)
        broad = node.type is not None and {"Exception", "BaseException"} & set(
            re.findall(r"\w+", ast.unparse(node.type))
        )
        if node.type is None or (broad and silent):
            yield f"{module}:{node.lineno} swallows every error"


def size_faults(source, module):
    """Files too long to be read at once."""
    lines = len(source.splitlines())
    if lines >= MAX_FILE_LINES:
        yield f"{module} has {lines} lines; under {MAX_FILE_LINES}"


def tool_faults(tree, source, name):
    """A tool is thin: short, no classes, and the package does the work."""
    if len(source.splitlines()) > MAX_TOOL_LINES:
        yield f"{name} is longer than {MAX_TOOL_LINES} lines: its logic belongs into the package"
    if any(isinstance(node, ast.ClassDef) for node in ast.walk(tree)):
        yield f"{name} defines a class: it belongs into the package"
    if not any(_inside(imported.name, ["piip_scale"]) for imported in imports(tree, name)):
        yield f"{name} does not use the package"


def config_faults(tree, name):
    """A config is values: assignments and a comment or docstring, nothing that runs."""
    for node in tree.body:
        documented = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if not isinstance(node, CONFIG_NODES) and not documented:
            yield f"{name}:{node.lineno} is more than a value: {ast.unparse(node).splitlines()[0]}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) not in ("dict", "list", "tuple"):
            yield f"{name}:{node.lineno} calls {ast.unparse(node.func)}"
