"""FlexAttention as a backend: all that is asked for is applied. There are few cases, as each compiles a kernel."""

import math

import pytest
import torch

import reference
from flash_dmattn import FLEX_AVAILABLE, DynamicMask, flash_dmattn_func, flash_dmattn_func_auto, flex_dmattn_func

pytestmark = pytest.mark.skipif(not FLEX_AVAILABLE, reason="FlexAttention cannot run here")
B, H, HK, D = 2, 4, 2, 16


def random_inputs(query_len, key_len, dtype=torch.float32, batch=B):
    torch.manual_seed(0)
    sizes = (batch, query_len, H, D), (batch, key_len, HK, D), (batch, key_len, HK, D)
    return [torch.randn(size, dtype=dtype) for size in sizes]


def check(inputs, bias=None, visible=None, scale=None, softcap=None, **options):
    """out and gradients against the reference."""
    leaves = [tensor for tensor in (*inputs, bias) if tensor is not None]
    for leaf in leaves:
        leaf.requires_grad_()
    expanded = bias if bias is None or bias.size(2) > 1 else bias.expand(-1, -1, inputs[0].size(1), -1)
    out = flex_dmattn_func(*inputs, attn_bias=expanded, scale=scale, softcap=softcap, **options)
    expected, _, _ = reference.attention(*inputs, bias=bias, visible=visible, scale=scale, softcap=softcap)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    torch.testing.assert_close(torch.autograd.grad(out, leaves, grad), torch.autograd.grad(expected, leaves, grad))


@pytest.mark.parametrize("query_len, key_len, scale", ((1, 70, 0.3), (45, 33, None)))
def test_causal(query_len, key_len, scale):
    visible = reference.causal_mask(query_len, key_len)[None, None]
    check(random_inputs(query_len, key_len), visible=visible, scale=scale, is_causal=True)


def test_mask_bias_and_softcap():
    query_len, key_len = 40, 50
    mask = torch.rand(B, 1, query_len, key_len) > 0.5
    mask[1, :, 3] = False  # a query that sees no key
    bias = torch.randn(1, H, query_len, key_len)
    check(random_inputs(query_len, key_len), bias=bias, visible=mask, attn_mask=mask.float(), softcap=1.5)


@pytest.mark.parametrize("is_causal", (True, False))
def test_dynamic_mask(is_causal):
    query_len, key_len = 140, 150
    bias = torch.randn(B, HK, 1, key_len)
    mask = DynamicMask.from_score(bias[:, :, 0], 20, query_len=query_len, is_causal=is_causal)
    check(random_inputs(query_len, key_len), bias=bias, visible=mask.to_dense(), attn_mask=mask)


def test_keep_window_size_with_padding():
    length = 150
    bias, padding = torch.randn(B, HK, 1, length), torch.rand(B, 1, 1, length) > 0.3
    visible = reference.dynamic_mask(bias[:, :, 0], 20, length, key_padding_mask=padding[:, 0, 0])
    options = {"attn_mask": padding, "is_causal": True, "keep_window_size": 20}
    check(random_inputs(length, length), bias=bias, visible=visible, **options)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_half_precision(dtype):
    inputs = random_inputs(40, 50, dtype)
    out = flash_dmattn_func_auto(backend="flex")(*inputs, is_causal=True)
    assert out.dtype == dtype
    expected = reference.attention(
        *(tensor.double() for tensor in inputs), visible=reference.causal_mask(40, 50)[None, None]
    )
    torch.testing.assert_close(out.double(), expected[0], rtol=2e-2, atol=2e-2)


def test_one_tensor_as_query_key_and_value():
    inputs = random_inputs(40, 40)[1:2] * 3
    out, expected = (function(*inputs) for function in (flex_dmattn_func, flash_dmattn_func))
    torch.testing.assert_close(out, expected)


def test_probabilities_and_lse():
    inputs = random_inputs(33, 45)
    got = flex_dmattn_func(*inputs, is_causal=True, deterministic=True, return_attn_probs=True)
    expected = reference.attention(*inputs, visible=reference.causal_mask(33, 45)[None, None])
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("batch, query_len, key_len", ((0, 3, 4), (2, 0, 4), (2, 3, 0)))
def test_empty(batch, query_len, key_len):
    inputs = random_inputs(query_len, key_len, batch=batch)
    out, lse, probs = flex_dmattn_func(*inputs, return_attn_probs=True)
    assert torch.equal(out, torch.zeros(batch, query_len, H, D))
    assert torch.equal(lse, torch.full((batch, H, query_len), -math.inf))
    assert probs.shape == (batch, H, query_len, key_len)


def test_float64_is_refused():
    with pytest.raises(TypeError, match="query is float64; it takes float16 or bfloat16 or float32"):
        flex_dmattn_func(*random_inputs(3, 4, torch.float64))
