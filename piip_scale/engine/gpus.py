"""GPUs as a plan knows them: numbers of their data sheets, one row each.

Arithmetic is the dense peak of tensor cores. Links are to the other GPUs of a node, of one GPU, in one direction:
NVLink through a switch where the form has one, else PCIe. Memory is what CUDA leaves of what the sheet says.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from piip_scale.errors import ConfigError


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU.

    Attributes:
        name: As a user writes it.
        cuda_name: What the name that CUDA gives it holds.
        memory_gib: GiB that CUDA offers.
        bf16_tflops: Dense TFLOP/s in bf16, summed in float32.
        tf32_tflops: The same in TF32.
        memory_gb_s: GB/s of its memory.
        link_gb_s: GB/s to the other GPUs of its node.
        pcie_gb_s: GB/s to its host.
    """

    name: str
    cuda_name: str
    memory_gib: float
    bf16_tflops: float
    tf32_tflops: float
    memory_gb_s: float
    link_gb_s: float
    pcie_gb_s: float


# NVIDIA's data sheets: "H100 Tensor Core GPU" (SXM, PCIe, NVL), "H200 Tensor Core GPU", "DGX B200" (an eighth), "A100
# Tensor Core GPU", "L40S", "Ada GPU Architecture" (appendix on the RTX 4090). They state tensor cores with sparsity:
# half of that is dense. NVLink's totals are of both directions. H800 and A800 have fewer links. Of two rows whose
# names both fit a device's, the first is it: A100 of 40 GB first says so itself.
GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu("h100-pcie", "H100 PCIe", 79.1, 756, 378, 2000, 64, 64),
        Gpu("h100-nvl", "H100 NVL", 93.1, 835, 417, 3900, 64, 64),
        Gpu("h100", "H100", 79.1, 989, 494, 3350, 450, 64),
        Gpu("h200", "H200", 139.8, 989, 494, 4800, 450, 64),
        Gpu("h800", "H800", 79.1, 989, 494, 3350, 200, 64),
        Gpu("b200", "B200", 178.4, 2250, 1125, 8000, 900, 64),
        Gpu("a100-40", "A100-SXM4-40GB", 39.4, 312, 156, 1555, 300, 32),
        Gpu("a100-80", "A100", 79.1, 312, 156, 2039, 300, 32),
        Gpu("a800", "A800", 79.1, 312, 156, 2039, 200, 32),
        Gpu("l40s", "L40S", 44.4, 362, 183, 864, 32, 32),
        Gpu("rtx4090", "RTX 4090", 23.5, 165, 82.6, 1008, 32, 32),
    )
}
DEFAULT_GPU = "h100"


def gpu_named(name: str) -> Gpu:
    """The row of a name, in any case.

    Raises:
        ConfigError: There is none; lists the names.
    """
    if found := GPUS.get(name.lower()):
        return found
    of_device = gpu_of_device(name)
    near = [of_device.name] if of_device else difflib.get_close_matches(name.lower(), GPUS, n=1)
    raise ConfigError(
        "--gpu",
        value=name,
        rule=f"one of {', '.join(GPUS)}",
        fix=f"did you mean {near[0]}?"
        if near
        else "plan with the one most like it, and say its memory with --gpu-memory-gib",
    )


def gpu_of_device(device_name: str) -> Gpu | None:
    """The row of a GPU by the name that CUDA gives it; ``None`` for one that is not in the table."""
    return next((gpu for gpu in GPUS.values() if gpu.cuda_name in device_name), None)
