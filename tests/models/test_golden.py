"""Tiny networks whose weights, outputs and gradients were written by the released code itself."""

import json

import pytest
import torch
from safetensors import safe_open

from piip_scale.models.official import from_official

FILES = [
    "cls_3branch_separate_head",
    "det_2branch_h6b",
    "det_3branch_beit",
    "det_3branch_convnext",
    "det_3branch_tsb_window",
]


@pytest.fixture(params=FILES)
def golden(request, reference):
    with safe_open(reference / "golden" / f"{request.param}.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    weights = {key.removeprefix("weight."): value for key, value in tensors.items() if key.startswith("weight.")}
    outputs = [tensors[key] for key in sorted(tensors) if key.startswith("output.")]
    return config, weights, tensors["image"], outputs, tensors["grad_image"]


def run(config, weights, image, dtype=torch.float32):
    model = from_official(config, weights).to(dtype)
    assert not model.training
    image = image.clone().to(dtype).requires_grad_()
    outputs = model(image)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    ramps = [torch.linspace(-1, 1, output.numel()).view_as(output) for output in outputs]
    sum((output * ramp).mean() for output, ramp in zip(outputs, ramps, strict=True)).backward()
    return outputs, image.grad


def test_outputs_and_image_gradient(golden):
    config, weights, image, expected, expected_grad = golden
    outputs, grad = run(config, weights, image)
    assert len(outputs) == len(expected)
    for output, truth in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, truth, atol=2e-5, rtol=0)
    torch.testing.assert_close(grad, expected_grad, atol=1e-4, rtol=0)


def test_image_gradient_against_its_own_size(golden):
    """The gradients are far smaller than 1e-4, so they are held to their own size as well.

    Rounding may send a value next to 0 through the other side of a ReLU, in the released run or in ours, and move a
    patch of the gradient by a thousandth. It does not do so in float32 and float64 alike.
    """
    config, weights, image, _, expected_grad = golden
    size = expected_grad.abs().max().item()
    errors = [
        (run(config, weights, image, dtype)[1] - expected_grad).abs().max().item() / size
        for dtype in (torch.float32, torch.float64)
    ]
    assert min(errors) < 5e-5
    assert max(errors) < 3e-3
