"""How many kernels the parts of PIIP-H6B start, forward and backward, counted on the meta device."""

import pytest
from sections.launches import PARTS, count

from piip_scale.config.model import Kernels


@pytest.mark.parametrize(
    ("part", "plain", "fused"),
    [
        ("block of InternViT-6B", (20, 30), (13, 23)),
        ("block of ViT-H", (18, 29), (12, 23)),
        ("interaction unit", (40, 82), (32, 74)),
        ("merging", (21, 28), (18, 26)),
    ],
)
def test_kernels_and_bytes_are_fewer_where_they_are_fused(part, plain, fused):
    found = [count(*PARTS[part](Kernels("sdpa", "triton", kernel))) for kernel in ("plain", "triton")]
    kernels = [(forward.kernels, backward.kernels) for forward, backward in found]
    assert kernels == [plain, fused]
    for before, after in zip(*found, strict=True):
        assert after.num_bytes < before.num_bytes
