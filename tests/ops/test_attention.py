import sys
import types

import pytest
import torch
from torch import Tensor

from piip_scale.errors import KernelError
from piip_scale.ops import attention as module
from piip_scale.ops import attention_order as order
from piip_scale.ops.attention import attention, join_heads, resolve_attention_kernel, split_heads


def slow_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    """One query at a time, from the definition."""
    output = torch.zeros_like(query)
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in query.shape[:3])).tolist():
        scores = torch.stack([torch.dot(query[b, h, i], k) for k in key[b, h]]) / query.shape[-1] ** 0.5
        scores = scores if bias is None else scores + bias[h, i]
        exponents = (scores - scores.max()).exp()
        output[b, h, i] = (exponents[:, None] * value[b, h]).sum(0) / exponents.sum()
    return output


def inputs(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8), (3, 5, 7))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("kernel", ["math", "sdpa", "auto"])
def test_kernels_follow_the_definition_forward_and_backward(kernel, biased):
    query, key, value, bias = inputs()
    operands = [query, key, value, bias] if biased else [query, key, value]
    cotangent = torch.randn(query.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = slow_attention(query, key, value, bias if biased else None)
    expected_grads = torch.autograd.grad(expected, operands, cotangent)

    output = attention(query, key, value, bias if biased else None, kernel=kernel)

    torch.testing.assert_close(output, expected, atol=1e-10, rtol=0)
    torch.testing.assert_close(torch.autograd.grad(output, operands, cotangent), expected_grads, atol=1e-10, rtol=0)


@pytest.mark.parametrize("kernel", ["math", "sdpa"])
def test_half_precision_stays_near_the_truth_and_keeps_its_dtype(kernel):
    query, key, value, _ = (tensor.detach() for tensor in inputs())
    output = attention(query.bfloat16(), key.bfloat16(), value.bfloat16(), kernel=kernel)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.double(), slow_attention(query, key, value, None), atol=3e-2, rtol=0)


def test_plain_kernel_normalises_in_float32():
    query = torch.full((1, 1, 1, 4), 64.0, dtype=torch.bfloat16)
    key = torch.cat((query, query * 1.0078125), 2)
    value = torch.tensor([[[[0.0], [1.0]]]], dtype=torch.bfloat16).expand(1, 1, 2, 4)
    scores = (query.double() * key.double()).sum(-1) / 2
    truth = scores.softmax(-1)[..., 1].item()
    assert attention(query, key, value, kernel="math")[0, 0, 0, 0].item() == pytest.approx(truth, abs=4e-3)


def test_heads_split_and_join_are_inverse():
    tokens = torch.randn(2, 5, 12)
    heads = split_heads(tokens, 3)
    assert heads.shape == (2, 3, 5, 4)
    assert torch.equal(heads[:, 1], tokens[..., 4:8])
    assert torch.equal(join_heads(heads), tokens)


def test_auto_chooses_and_names_are_kept():
    assert resolve_attention_kernel("auto", "cpu", torch.float32) == "sdpa"
    assert resolve_attention_kernel("math", "cuda", torch.bfloat16) == "math"


@pytest.mark.parametrize(
    ("name", "device", "dtype", "part"),
    [
        ("flash", "cpu", torch.bfloat16, "torch.bfloat16 on cpu"),
        ("flash", "cuda", torch.float32, "float16 or bfloat16"),
        ("fast", "cpu", torch.float32, "one of auto, math, sdpa, cudnn, flash"),
    ],
)
def test_a_kernel_that_cannot_serve_raises_one_line(name, device, dtype, part):
    with pytest.raises(KernelError) as raised:
        resolve_attention_kernel(name, device, dtype)
    assert part in str(raised.value)
    assert "\n" not in str(raised.value)


def test_flash_named_but_not_installed_raises(monkeypatch):
    monkeypatch.setattr(module, "_FLASH_MODULES", ("a_module_nobody_has",))
    module.find_flash_functions.cache_clear()
    resolve_attention_kernel.cache_clear()
    with pytest.raises(KernelError, match="flash is not installed"):
        resolve_attention_kernel("flash", "cuda", torch.bfloat16)
    assert resolve_attention_kernel("auto", "cuda", torch.bfloat16) == "sdpa"
    module.find_flash_functions.cache_clear()
    resolve_attention_kernel.cache_clear()


def test_a_kernel_that_cannot_be_imported_is_told(monkeypatch, tmp_path, caplog):
    (tmp_path / "built_for_another_torch.py").write_text("raise ImportError('undefined symbol: _ZN3c10')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(module, "_FLASH_MODULES", ("built_for_another_torch",))
    module.find_flash_functions.cache_clear()
    assert module.find_flash_functions() == {}
    module.find_flash_functions.cache_clear()
    assert "built_for_another_torch is installed, and cannot be imported: undefined symbol" in caplog.text


@pytest.mark.parametrize("returns_tuple", [False, True])
def test_flash_is_called_in_its_own_layout(monkeypatch, returns_tuple):
    def flash_attn_func(query_BLHD, key_BSHD, value_BSHD):
        assert query_BLHD.shape == (2, 5, 3, 8)
        assert key_BSHD.shape == value_BSHD.shape == (2, 7, 3, 8)
        output = slow_attention(*(tensor.transpose(1, 2) for tensor in (query_BLHD, key_BSHD, value_BSHD)), None)
        output = output.transpose(1, 2)
        return (output, None) if returns_tuple else output

    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace(flash_attn_func=flash_attn_func))
    module.find_flash_functions.cache_clear()
    query, key, value, _ = inputs()
    output = module.call_flash(module._flash_function(), query, key, value)
    module.find_flash_functions.cache_clear()
    torch.testing.assert_close(output, slow_attention(query, key, value, None), atol=1e-10, rtol=0)


@pytest.fixture
def flash(monkeypatch):
    """Shapes that a stand-in for FlashAttention was called with, on a device that counts as one of CUDA."""
    called = []
    stand_in = lambda query, key, value: called.append(query.shape) or query  # noqa: E731
    monkeypatch.setattr(module, "_find_flash", lambda: stand_in)
    resolve_attention_kernel.cache_clear()
    yield called
    resolve_attention_kernel.cache_clear()
    module.forget_preferred_kernels()


def choice(size, tokens=100, biased=False, name="auto"):
    return module.resolve_attention(name, "cuda", torch.bfloat16, size, tokens, biased)


def test_auto_uses_flash_only_where_every_generation_has_a_kernel(flash):
    assert (choice(64), choice(80), choice(64, biased=True)) == ("flash", "sdpa", "sdpa")
    assert choice(80, name="flash") == "flash"


def test_flash_adds_no_bias(flash, monkeypatch):
    monkeypatch.setattr(module, "resolve_attention", lambda *_, **__: "flash")
    heads, bias = torch.randn(1, 2, 3, 64), torch.zeros(2, 3, 3)
    attention(heads, heads, heads, kernel="flash")
    assert flash == [(1, 3, 2, 64)]
    with pytest.raises(KernelError, match="cannot add a position bias"):
        attention(heads, heads, heads, bias, kernel="flash")


def test_auto_takes_what_is_preferred_for_the_nearest_number_of_tokens(flash):
    module.prefer_attention_kernel(64, 196, False, "cudnn")
    module.prefer_attention_kernel(64, 4096, False, "sdpa")
    assert [choice(64, tokens) for tokens in (49, 196, 800, 900, 9604)] == ["cudnn"] * 3 + ["sdpa"] * 2
    assert choice(64, 196, biased=True) == "sdpa"
    assert choice(128, 196) == "flash"
    assert choice(64, 196, name="flash") == "flash"
    assert module.resolve_attention("auto", "cpu", torch.bfloat16, 64, 196, False) == "sdpa"


def test_kernels_are_ordered_by_their_time_and_one_that_refuses_is_left_out(flash, monkeypatch, caplog):
    shape = order.AttentionShape(2, 3, 5, 64, False, torch.bfloat16)
    monkeypatch.setattr(order, "usable_attention_kernels", lambda *_: ("sdpa", "math", "cudnn"))
    spent = iter([3.0, 1.0])

    def timer(run):
        assert [tuple(grad.shape) for grad in run()] == [(2, 3, 5, 64)] * 3
        return next(spent)

    assert list(order.measure_attention(shape, torch.device("cpu"), timer).items()) == [("math", 1.0), ("sdpa", 3.0)]
    assert "attention kernel cudnn does not serve" in caplog.text


def test_nothing_is_measured_where_one_kernel_alone_can_serve(flash):
    def timer(run):
        raise AssertionError("measured")

    biased = order.AttentionShape(1, 1, 2, 64, True, torch.float32)
    assert order.measure_attention(biased, torch.device("cpu"), timer) == {}
    assert set(module.usable_attention_kernels("cuda", torch.bfloat16, 64, False)) >= {"sdpa", "flash"}
    assert "flash" not in module.usable_attention_kernels("cuda", torch.bfloat16, 80, False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kernel", ["sdpa", "auto"])
def test_device_kernels_follow_the_plain_formula(kernel):
    tensors = [tensor.detach().cuda().bfloat16().requires_grad_() for tensor in inputs()[:3]]
    truth = attention(*tensors, kernel="math")
    output = attention(*tensors, kernel=kernel)
    torch.testing.assert_close(output, truth, atol=2e-2, rtol=2e-2)
    for mine, theirs in zip(
        torch.autograd.grad(output.sum(), tensors), torch.autograd.grad(truth.sum(), tensors), strict=True
    ):
        torch.testing.assert_close(mine, theirs, atol=3e-2, rtol=3e-2)
