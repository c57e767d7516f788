"""How many kernels the parts of PIIP-H6B start, forward and backward, counted on the meta device."""

import pytest
from sections.launches import PARTS, count

from piip_scale.config.model import Kernels


@pytest.mark.parametrize(
    ("part", "plain", "fused"),
    [
        ("block of ViT-H", (18, 29), (12, 25)),
        ("interaction unit", (54, 90), (46, 86)),
        ("merging", (21, 28), (18, 26)),
    ],
)
def test_kernels_and_bytes_are_fewer_where_they_are_fused(part, plain, fused):
    found = [count(*PARTS[part](Kernels("sdpa", "triton", kernel))) for kernel in ("plain", "triton")]
    kernels = [(forward.kernels, backward.kernels) for forward, backward in found]
    assert kernels == [plain, fused]
    for before, after in zip(*found, strict=True):
        assert after.num_bytes < before.num_bytes
