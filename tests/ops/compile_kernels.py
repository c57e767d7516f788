"""Compiles the Triton kernels for a Hopper GPU, which need not be here, and prints what came of each, a JSON line each.

Run in a process of its own: triton decides at import whether it compiles or interprets.
"""

import json
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from piip_scale.ops import column_sums_triton as column_sums
from piip_scale.ops import deform_attention_triton as deform
from piip_scale.ops import gelu_triton as gelu
from piip_scale.ops import group_norm_triton as group_norm
from piip_scale.ops import merge_map_triton as merge_map
from piip_scale.ops import qk_norm_triton as qk_norm
from piip_scale.ops import residual_triton as residual

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Case:
    """A kernel with the types of its arguments by name; others are integers, those of no type are absent."""

    kernel: Any
    label: str
    types: dict[str, str | None]
    constants: dict[str, int]


def pointers(kind: str, *names: str) -> dict[str, str]:
    return dict.fromkeys(names, f"*{kind}")


def cases() -> Iterator[Case]:
    types = pointers("bf16", "value", "output", "grad_output") | pointers("fp32", "grad_value")
    types |= pointers("fp32", "places", "weights", "grad_places", "grad_weights")
    on_grid = types | pointers("bf16", "places", "weights", "grad_places", "grad_weights")
    for kernel in (deform._forward_kernel, deform._backward_kernel):
        # heads, channels: the large and the small side of PIIP-H6B, PIIP-TSB and PIIP-SBL.
        for heads, channels in ((16, 100), (16, 40), (6, 24), (16, 64)):
            constants = deform.layout(heads, channels, points=4, on_grid=True)
            yield Case(kernel, f"deform {channels} grid", on_grid, constants)
        # DINO's encoder and decoder, whose queries are anywhere.
        yield Case(kernel, "deform 32 anywhere", types, deform.layout(8, 32, points=4))
    halves = pointers("bf16", "x", "residual", "gamma", "output", "grad", "grad_residual") | {"factor": "fp32"}
    # InternViT-6B, ViT-H, DeiT-S; the mask is of the input's dtype, the index of int64.
    for width, mode, chosen in ((3200, 0, None), (1280, 1, "*bf16"), (384, 2, "*i64")):
        types = halves | pointers("fp32", "partial") | {"chosen": chosen}
        constants = residual.layout(width, mode, scaled=True)
        yield Case(residual._forward_kernel, f"residual {width}", types, constants | {"BLOCK_KEPT": 16})
        sums = {"TILES": 4, "SUMS": 1}
        yield Case(residual._backward_kernel, f"residual {width}", types, constants | sums)
    halves = pointers("bf16", "x", "grad", "gamma", "beta", "output", "grad_x", "grad_gamma", "grad_beta")
    floats = pointers("fp32", "means", "squares", "mean", "rstd", "grads", "products", "mean_grad", "mean_product")
    # The merged widths of PIIP-H6B and PIIP-TSB; ReLU as in the merging, GELU as in the pyramid.
    for width, activation in ((3200, 2), (768, 1)):
        for name in ("sum", "join", "apply", "grad_sum", "grad_join", "grad_apply"):
            kernel = getattr(group_norm, f"_{name}_kernel")
            constants = group_norm.layout(width, 32, 0 if name == "sum" else activation)
            yield Case(kernel, f"norm {width} {activation}", halves | floats | {"eps": "fp32"}, constants)
    types = pointers("bf16", "source", "weight", "grad_source") | pointers("fp32", "total", "output", "grad", "partial")
    yield Case(merge_map._forward_kernel, "merge 3200", types, merge_map.layout(3200) | {"BEGINS": 0})
    yield Case(merge_map._backward_kernel, "merge 3200", types, merge_map.layout(3200))
    # InternViT-6B's rows, and narrower ones.
    types = pointers("bf16", "qkv", "query", "key", "query_gamma", "key_gamma", "grad_qkv") | {"eps": "fp32"}
    types |= pointers("bf16", "grad_query", "grad_key", "grad_value") | pointers("fp32", "rstd", "partial")
    for width in (3200, 1280):
        constants = qk_norm.layout(width) | {"ROWS": 8, "SUMS": 1}
        yield Case(qk_norm._forward_kernel, f"qk {width}", types, constants)
        yield Case(qk_norm._backward_kernel, f"qk {width}", types, constants)
    types = pointers("bf16", "hidden", "grad", "grad_hidden") | pointers("fp32", "partial")
    for width in (12800, 5120):
        yield Case(gelu._backward_kernel, f"gelu {width}", types, gelu.layout(width, sums=True))
    types = pointers("fp32", "partial") | pointers("bf16", "total")
    yield Case(column_sums._join_kernel, "sums 3200", types, column_sums.layout(3200))


def compile_case(case: Case) -> dict[str, Any]:
    constants: dict[str, Any] = {name: value for name, value in case.constants.items() if name in case.kernel.arg_names}
    constants |= {name: None for name, kind in case.types.items() if kind is None and name in case.kernel.arg_names}
    types = case.types | dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "i32") for name in case.kernel.arg_names}
    # As torch's allocator gives them.
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind[0] == "*"}
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {name: value for name, value in case.constants.items() if name == "num_warps"}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    Path("kernel.cubin").write_bytes(compiled.asm["cubin"])
    command = [CUOBJDUMP, "-res-usage", "kernel.cubin"]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {
        "kernel": case.kernel.__name__,
        "label": case.label,
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "ptx": compiled.asm["ptx"],
    }


if __name__ == "__main__":
    for case in cases():
        print(json.dumps(compile_case(case)))
