"""Scaled dot-product attention behind one function, by the fastest kernel present or the one asked for by name."""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from piip_scale.errors import KernelError
from piip_scale.logging import get_logger

FlashFunction = Callable[..., "Tensor | tuple[Tensor, ...]"]

_FLASH_MODULES = ("flash_attn.cute", "flash_attn_interface", "flash_attn")
"""Newest first: FlashAttention 4, 3 and 2."""
_FLASH_HEAD_SIZES = (64, 96, 128, 192, 256)
"""What every generation has kernels for; others are padded by some and refused by others."""
_HALF = (torch.float16, torch.bfloat16)
_HOPPER = (9, 0)


def attention(
    query_BHLD: Tensor,
    key_BHSD: Tensor,
    value_BHSD: Tensor,
    bias_HLS: Tensor | None = None,
    kernel: str = "auto",
) -> Tensor:
    """Softmax attention with scale D ** -0.5, without mask or dropout.

    Args:
        query_BHLD: Queries (B, heads, L, D).
        key_BHSD: Keys (B, heads, S, D), same dtype.
        value_BHSD: Values (B, heads, S, D), same dtype.
        bias_HLS: Added to the scores of every sample, (heads, L, S).
        kernel: ``math``, ``sdpa`` (torch's choice), ``cudnn`` (torch's call of cuDNN), ``flash`` or ``auto``.

    Returns:
        (B, heads, L, D) in the queries' dtype.

    Raises:
        KernelError: The kernel named cannot serve these tensors on this machine.
    """
    tokens, size = query_BHLD.shape[-2:]
    asked = (kernel, query_BHLD.device.type, query_BHLD.dtype, size)
    if torch.compiler.is_compiling():
        chosen = _resolve_for_program(*asked, bias_HLS is not None)
    else:
        chosen = resolve_attention(*asked, tokens, biased=bias_HLS is not None)
    if chosen == "flash" and bias_HLS is None:
        return _opaque_flash(_flash_function(), query_BHLD, key_BHSD, value_BHSD)
    if chosen == "flash":
        raise KernelError("flash attention cannot add a position bias", fix="set attention_kernel to sdpa or auto")
    if chosen == "math":
        return _plain_attention(query_BHLD, key_BHSD, value_BHSD, bias_HLS)
    bias = None if bias_HLS is None else bias_HLS.to(query_BHLD.dtype)
    if chosen == "cudnn":
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return functional.scaled_dot_product_attention(query_BHLD, key_BHSD, value_BHSD, attn_mask=bias)
    return functional.scaled_dot_product_attention(query_BHLD, key_BHSD, value_BHSD, attn_mask=bias)


def split_heads(tokens_BLC: Tensor, num_heads: int) -> Tensor:
    """Tokens (B, L, C) to heads (B, heads, L, C / heads)."""
    heads_BLHD: Tensor = tokens_BLC.unflatten(-1, (num_heads, -1))
    return heads_BLHD.transpose(1, 2)


def join_heads(heads_BHLD: Tensor) -> Tensor:
    """Heads (B, heads, L, D) to tokens (B, L, heads * D)."""
    return heads_BHLD.transpose(1, 2).flatten(2)


_preferred: dict[tuple[int, bool], dict[int, str]] = {}


def prefer_attention_kernel(size: int, tokens: int, biased: bool, kernel: str) -> None:
    """Has ``auto`` take a kernel for heads of this size, with or without bias, and about so many tokens.

    Every rank must prefer the same: kernels round differently.
    """
    _preferred.setdefault((size, biased), {})[tokens] = kernel


def forget_preferred_kernels() -> None:
    """``auto`` goes by its own rule again."""
    _preferred.clear()


def resolve_attention(name: str, device_type: str, dtype: torch.dtype, size: int, tokens: int, biased: bool) -> str:
    """The kernel that ``name`` means for an attention: ``math``, ``sdpa``, ``cudnn`` or ``flash``.

    ``auto`` takes what is preferred for the nearest number of tokens; where nothing is, FlashAttention if it is
    installed and every generation of it serves the attention, else torch's choice.

    Args:
        name: A kernel or ``auto``.
        device_type: Where the tensors are.
        dtype: Their dtype.
        size: Channels of a head.
        tokens: Queries.
        biased: Whether a bias is added to the scores.

    Raises:
        KernelError: As ``resolve_attention_kernel``.
    """
    chosen = resolve_attention_kernel(name, device_type, dtype)
    if name != "auto" or device_type != "cuda":
        return chosen
    if known := _preferred.get((size, biased)):
        return known[min(known, key=lambda at: abs(math.log(at / tokens)))]
    return "sdpa" if biased or size not in _FLASH_HEAD_SIZES else chosen


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _resolve_for_program(name: str, device_type: str, dtype: torch.dtype, size: int, biased: bool) -> str:
    """``resolve_attention`` in code that torch compiles: a program is for any number of tokens, so the most count."""
    tokens = max(_preferred.get((size, biased), {1: name}))
    return resolve_attention(name, device_type, dtype, size, tokens, biased)


def usable_attention_kernels(device_type: str, dtype: torch.dtype, size: int, biased: bool) -> tuple[str, ...]:
    """The kernels worth measuring for an attention; whether one refuses it only a call shows."""
    if device_type != "cuda" or dtype not in _HALF:
        return ("sdpa",)
    flash = not biased and size in _FLASH_HEAD_SIZES and _find_flash() is not None
    cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    return ("sdpa", *["cudnn"] * cudnn, *["flash"] * flash)


@lru_cache(maxsize=64)
def resolve_attention_kernel(name: str, device: str | torch.device, dtype: torch.dtype) -> str:
    """The kernel that ``name`` means for tensors of this device and dtype: ``math``, ``sdpa``, ``cudnn`` or ``flash``.

    Args:
        name: A kernel, or ``auto`` for the fastest present.
        device: Where the tensors are.
        dtype: Their dtype.

    Raises:
        KernelError: The kernel named is unknown, not installed, or not for this device and dtype.
    """
    if name in ("math", "sdpa"):
        return name
    device_type = torch.device(device).type
    if name == "auto":
        usable = device_type == "cuda" and dtype in _HALF and _find_flash() is not None
        return "flash" if usable else "sdpa"
    if name not in ("cudnn", "flash"):
        raise KernelError("unknown attention kernel", value=name, rule="one of auto, math, sdpa, cudnn, flash")
    if device_type != "cuda" or dtype not in _HALF:
        raise KernelError(
            f"{name} attention cannot run here",
            value=f"{dtype} on {device_type}",
            rule="it needs float16 or bfloat16 on a CUDA device",
            fix="set attention_kernel to auto or sdpa",
        )
    require_attention_kernel(name)
    return name


def require_attention_kernel(name: str) -> None:
    """Raises a ``KernelError`` where the library of a kernel asked for by name is not installed."""
    if name == "flash":
        _flash_function()


def _plain_attention(query_BHLD: Tensor, key_BHSD: Tensor, value_BHSD: Tensor, bias_HLS: Tensor | None) -> Tensor:
    wide = torch.promote_types(query_BHLD.dtype, torch.float32)
    scale = query_BHLD.shape[-1] ** -0.5
    scores_BHLS = (query_BHLD.to(wide) * scale) @ key_BHSD.to(wide).transpose(-2, -1)
    if bias_HLS is not None:
        scores_BHLS = scores_BHLS + bias_HLS.to(wide)
    output_BHLD: Tensor = scores_BHLS.softmax(dim=-1) @ value_BHSD.to(wide)
    return output_BHLD.to(query_BHLD.dtype)


def call_flash(function: FlashFunction, *tensors_BHLD: Tensor) -> Tensor:
    """Calls a function of FlashAttention, whose layout is (B, L, heads, D), with queries, keys and values in ours."""
    result = function(*(tensor.transpose(1, 2) for tensor in tensors_BHLD))
    # FlashAttention 2 returns the output; some builds of 3 and 4 return the log-sum-exp beside it.
    output_BLHD = result[0] if isinstance(result, tuple) else result
    return output_BLHD.transpose(1, 2)


# Some of its generations cannot be traced: a compiled block calls it between two programs.
_opaque_flash: Callable[..., Tensor] = torch.compiler.disable(call_flash)


def _flash_function() -> FlashFunction:
    function = _find_flash()
    if function is None:
        raise KernelError(
            "attention kernel flash is not installed",
            rule="it needs the package flash-attn, flash-attn-4 or FlashAttention 3's flash_attn_interface",
            fix="install one, or set attention_kernel to auto or sdpa",
        )
    return function


def _find_flash() -> FlashFunction | None:
    return next(iter(find_flash_functions().values()), None)


@lru_cache(maxsize=1)
def find_flash_functions() -> dict[str, FlashFunction]:
    """FlashAttention's functions that are installed and fit this device, by module, newest first.

    One that is installed and cannot be imported, mostly for having been built for another torch, is warned of.
    """
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() >= _HOPPER
    found = {}
    for name in _FLASH_MODULES if hopper else _FLASH_MODULES[-1:]:
        if not _is_installed(name):
            continue
        try:
            function = getattr(importlib.import_module(name), "flash_attn_func", None)
        except ImportError as error:
            line = " ".join(str(error).split())
            get_logger(__name__).warning("attention kernel %s is installed, and cannot be imported: %s", name, line)
            continue
        if function is not None:
            found[name] = function
    return found


def _is_installed(module: str) -> bool:
    if module in sys.modules:
        return True
    parent, _, child = module.partition(".")
    # To look for a child imports its parent; what that raises is of the parent, which has an entry of its own.
    try:
        return importlib.util.find_spec(parent) is not None and (not child or bool(importlib.util.find_spec(module)))
    except ImportError:
        return False
