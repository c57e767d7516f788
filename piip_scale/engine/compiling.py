"""Blocks compiled by torch.compile: what a unit computes between its hooks becomes one program.

Blocks of a kind share a program. Random numbers are drawn outside it, so compiled and eager blocks drop the same
paths, and parameters are gathered outside, so it meets whole ones only. Interaction units stay as they are: most of
their work is a kernel of its own.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from piip_scale.config.run import TrainConfig
from piip_scale.errors import KernelError
from piip_scale.models.branch import Branch
from piip_scale.models.unit import units_of
from piip_scale.ops.residual import Paths

BACKEND = "inductor"
_PROGRAMS_A_BRANCH = 32
"""More than any branch needs: two modes, with and without windows, paths to drop, gradients of the input; any of these
for the first size of image and for all sizes."""


def compiles(config: TrainConfig, device: torch.device) -> bool:
    """Whether a run's blocks are compiled: as ``train.compile`` says, ``auto`` on a GPU that can be compiled for.

    Raises:
        KernelError: They shall be, and nothing here can build the programs.
    """
    missing = _missing_tools(device)
    if config.compile == "blocks" and missing:
        raise KernelError(
            "train.compile='blocks' cannot build programs here",
            value=f"no {' and no '.join(missing)}",
            rule=f"torch.compile needs them for {device.type}",
            fix="install them, or set train.compile='off'",
        )
    if config.compile == "auto":
        return device.type == "cuda" and not missing and not config.deterministic
    return config.compile == "blocks"


def compile_line(config: TrainConfig, device: torch.device) -> str:
    """The start report's line on whether blocks are compiled, and why not.

    Raises:
        KernelError: As ``compiles``.
    """
    if compiles(config, device):
        return "blocks: compiled, at their first use and for all sizes at the second size of image"
    reason = f"train.compile={config.compile!r}"
    if config.compile == "auto":
        missing = _missing_tools(device)
        reason += " on a CPU" if device.type == "cpu" else f" without {' and '.join(missing)}" if missing else ""
        reason += " with train.deterministic" if config.deterministic else ""
    return f"blocks: not compiled ({reason})"


def compile_blocks(model: nn.Module, backend: str = BACKEND) -> int:
    """Has every block of a branch be computed by a compiled program, which is built at its first use.

    The first size of image gets a program of its own. At the second one a program for any height and width is built, so
    that multi-scale training builds each twice, whatever sizes come.

    Args:
        model: The model.
        backend: Of ``torch.compile``.

    Returns:
        How many blocks.
    """
    limits: Any = torch._dynamo.config
    # Beyond it torch would compute eagerly, with no more than a warning; its default of 8 is for one kind of block.
    limits.recompile_limit = max(limits.recompile_limit, _PROGRAMS_A_BRANCH)
    count = 0
    branches = (module for module in model.modules() if isinstance(module, Branch))
    for index, branch in enumerate(branches):
        for block in units_of(branch):
            block.replace_computation(functools.partial(_compiled, branch=index, backend=backend))
            count += 1
    return count


def _compiled(compute: Callable[..., Any], branch: int, backend: str) -> Callable[..., Any]:
    own = types.MethodType(_of_branch(compute.__func__, branch), compute.__self__)  # type: ignore[attr-defined]
    program = torch.compile(own, backend=backend)

    def computation(drawn: tuple[Paths | None, ...], *arguments: Any) -> Any:
        return program(tuple(paths and paths.as_input() for paths in drawn), *arguments)

    return computation


@functools.cache
def _of_branch(function: types.FunctionType, branch: int) -> types.FunctionType:
    """The same function as one of the branch's own.

    Torch keeps programs, and what it knows of changing sizes, by a function's code: shared, the second branch would
    look like another size of image to the first one's.
    """
    code = function.__code__.replace(co_name=f"{function.__name__}_of_branch_{branch}")
    own = types.FunctionType(code, function.__globals__, code.co_name, function.__defaults__, function.__closure__)
    own.__kwdefaults__ = function.__kwdefaults__
    return own


def _missing_tools(device: torch.device) -> list[str]:
    missing = []
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        missing.append("triton")
    compiler = os.environ.get("CXX" if device.type == "cpu" else "CC")
    names = (compiler,) if compiler else ("g++", "clang++") if device.type == "cpu" else ("gcc", "clang", "cc")
    if not any(shutil.which(name) for name in names):
        missing.append("C++ compiler" if device.type == "cpu" else "C compiler")
    return missing
