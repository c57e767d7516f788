"""Products in float32: what the key means, what it sets in torch, and what the start report says."""

import pytest
import torch
from ranks import tiny_config

from piip_scale.engine.fp32_precision import apply_fp32_precision, fp32_precision_lines


@pytest.fixture(autouse=True)
def restored():
    flags = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = flags


@pytest.mark.parametrize(
    ("precision", "key", "chosen"),
    [
        ("bf16", "auto", "tf32"),
        ("fp32", "auto", "ieee"),
        ("bf16", "ieee", "ieee"),
        ("fp32", "tf32", "tf32"),
    ],
)
def test_products_and_convolutions_have_the_precision_that_is_reported(precision, key, chosen):
    train = tiny_config(train={"precision": precision, "fp32_precision": key}).train
    apply_fp32_precision(train)
    assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == (chosen == "tf32")
    # torch.compile asks for it, and would be refused where products and convolutions differ.
    assert torch.get_float32_matmul_precision() == {"tf32": "high", "ieee": "highest"}[chosen]
    (line,) = fp32_precision_lines(train, torch.device("cuda", 0))
    assert f": {chosen}, " in line
    assert fp32_precision_lines(train, torch.device("cpu")) == []
