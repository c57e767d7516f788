"""The start report's lines on kernels, and that all ranks take what rank 0 measured."""

import pytest
import torch
from ranks import run_ranks, tiny_config

from piip_scale.engine import kernel_choice
from piip_scale.ops import attention as attention_module

NETWORK = {
    "branches": [
        {
            "kind": "vit",
            "embed_dim": 64,
            "depth": 2,
            "num_heads": 2,
            "resolution_px": 64,
            "window_size_tokens": [0, 3],
        },
        {"kind": "convnext", "depths": [1], "widths": [32], "blocks_per_stage": [1], "resolution_px": 128},
    ],
    "interaction": {"num_stages": 1, "num_heads": 2},
    "pyramid": {"kind": "regular", "scales": [1.0], "stages": [0]},
}


def test_every_attention_of_a_branch_has_its_shape():
    config = tiny_config(model=NETWORK, data={"micro_batch_size": 2}, train={"steps": 1, "precision": "bf16"})
    full, windowed = kernel_choice.attention_shapes(config.model.branches[0], config)
    assert (full.batch, full.heads, full.tokens, full.size, full.dtype) == (2, 2, 16, 32, torch.bfloat16)
    # 4 x 4 cells in windows of 3 x 3: four of them, padded.
    assert (windowed.batch, windowed.tokens) == (2 * 4, 9)
    assert list(kernel_choice.attention_shapes(config.model.branches[1], config)) == []


def test_a_cpu_reports_its_kernels_and_measures_nothing():
    config = tiny_config(model=NETWORK, train={"steps": 1, "precision": "fp32"})
    assert kernel_choice.choose_kernels(config, torch.device("cpu")) == [
        "branch 0: attention: sdpa (heads of 32, 16 tokens)",
        "branch 0: attention: sdpa (heads of 32, 9 tokens)",
        "deformable attention: reference; between products: plain",
    ]


def lines_of_a_pretended_gpu(world, device):
    """Rank 1 would measure another order, and must not be asked."""
    config = tiny_config(model=NETWORK, train={"steps": 1, "precision": "bf16"})
    order = [{"cudnn": 1.0, "sdpa": 2.0}, {"sdpa": 1.0, "cudnn": 2.0}][world.rank]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel_choice, "measure_attention", lambda *_: order)
        patch.setattr(kernel_choice, "resolve_deform_kernel", lambda *_: "triton")
        lines = kernel_choice.choose_kernels(config, torch.device("cuda"))
    taken = attention_module.resolve_attention("auto", "cuda", torch.bfloat16, 32, 16, False)
    attention_module.forget_preferred_kernels()
    return taken, lines


def test_all_ranks_take_the_order_that_the_main_one_measured():
    first, second = run_ranks(2, lines_of_a_pretended_gpu)
    assert first == second
    assert first[0] == "cudnn"
    assert first[1][0] == "branch 0: attention: cudnn (heads of 32, 16 tokens; measured cudnn 1.00 ms, sdpa 2.00 ms)"
