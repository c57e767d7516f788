"""Puts the stand-in where mmcv looks for its compiled module."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from functools import cache, wraps
from types import ModuleType
from typing import Any

from piip_scale.errors import KernelError
from piip_scale.logging import get_logger
from piip_scale.tasks.mmcv_ext import boxes, deformable_attention, focal_loss, roi_align
from piip_scale.tasks.mmcv_ext.unmeasured import convolution, soft_nms, softmax_focal

_NAME = "mmcv._ext"
_OPS: dict[str, Callable[..., Any]] = {
    "nms": boxes.nms,
    "roi_align_forward": roi_align.roi_align_forward,
    "roi_align_backward": roi_align.roi_align_backward,
    "sigmoid_focal_loss_forward": focal_loss.sigmoid_focal_loss_forward,
    "sigmoid_focal_loss_backward": focal_loss.sigmoid_focal_loss_backward,
    "ms_deform_attn_forward": deformable_attention.ms_deform_attn_forward,
    "ms_deform_attn_backward": deformable_attention.ms_deform_attn_backward,
    "get_compiler_version": lambda: "none (piip_scale's stand-in)",
    "get_compiling_cuda_version": lambda: "none (piip_scale's stand-in)",
}


_UNMEASURED: dict[str, Callable[..., Any]] = {
    "softnms": soft_nms.softnms,
    "nms_match": soft_nms.nms_match,
    "softmax_focal_loss_forward": softmax_focal.softmax_focal_loss_forward,
    "softmax_focal_loss_backward": softmax_focal.softmax_focal_loss_backward,
    "deform_conv_forward": convolution.deform_conv_forward,
    "deform_conv_backward_input": convolution.deform_conv_backward_input,
    "deform_conv_backward_parameters": convolution.deform_conv_backward_parameters,
    "modulated_deform_conv_forward": convolution.modulated_deform_conv_forward,
    "modulated_deform_conv_backward": convolution.modulated_deform_conv_backward,
}


def install() -> None:
    """Makes ``mmcv._ext`` importable; call it before anything imports mmdet. Further calls change nothing.

    A compiled mmcv is used as it is: the stand-in is asked last, after Python has looked for the real module.

    Raises:
        KernelError: A compiled mmcv is installed and does not load.
    """
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
    try:
        importlib.import_module(_NAME)
    except ImportError as error:
        raise KernelError(
            "the compiled mmcv does not load",
            value=str(error),
            rule="it must be built for this torch",
            fix="rebuild it, or install mmcv-lite in its place",
        ) from error


def is_stand_in() -> bool:
    """Whether ``mmcv._ext``, once imported, is the stand-in."""
    spec = getattr(sys.modules.get(_NAME), "__spec__", None)
    return spec is not None and isinstance(spec.loader, _Loader)


class _Loader(importlib.abc.Loader):
    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        unmeasured = {name: _announced(name, op) for name, op in _UNMEASURED.items()}
        vars(module).update(_OPS, **unmeasured, __getattr__=_absent)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(_NAME, _Loader()) if fullname == _NAME else None


def _announced(name: str, op: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(op)
    def announced(*arguments: Any, **options: Any) -> Any:
        _announce(name)
        return op(*arguments, **options)

    return announced


@cache
def _announce(name: str) -> None:
    """Once for each op."""
    get_logger(__name__).warning(
        "mmcv's op %s is the stand-in's, whose speed nobody has measured; a compiled mmcv 2.1 has its own", name
    )


def _absent(name: str) -> Callable[..., Any]:
    # mmcv asks for every op at import, used or not: only the call may fail.
    if name.startswith("__"):
        raise AttributeError(name)

    def raise_absent(*_args: object, **_kwargs: object) -> None:
        raise KernelError(
            f"mmcv's compiled op {name} is not in the stand-in",
            rule=f"it has {', '.join(sorted(_OPS | _UNMEASURED))}",
            fix="choose a head that needs no other, or install a compiled mmcv 2.1",
        )

    return raise_absent
