"""Finite input never gives NaN, rows that see no key are zero, and tensors may be empty."""

import math

import pytest
import torch

import reference
from devices import generator as make_generator
from devices import on_gpu, usual_dtype
from flash_dmattn import DynamicMask, flash_dmattn_func

pytestmark = pytest.mark.usefixtures("device")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def random_inputs(dtype, query_len=70, key_len=130, heads=4, kv_heads=2, head_dim=24, batch=2, factor=1.0):
    generator = make_generator(0)
    sizes = (query_len, heads), (key_len, kv_heads), (key_len, kv_heads)
    return [
        (torch.randn(batch, *size, head_dim, generator=generator, dtype=torch.float64) * factor)
        .to(dtype)
        .requires_grad_()
        for size in sizes
    ]


def run(inputs, **options):
    """out, lse, probs, gradients of the inputs and of a bias that asks for one."""
    out, lse, probs = flash_dmattn_func(*inputs, **options, return_attn_probs=True)
    bias = options.get("attn_bias")
    leaves = [*inputs, bias] if bias is not None and bias.requires_grad else inputs
    grads = torch.autograd.grad([out, lse], leaves, [torch.ones_like(out), torch.ones_like(lse)])
    return out.detach(), lse.detach(), probs, *grads


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", (None, 30.0))
@pytest.mark.parametrize("is_causal", (False, True))
def test_large_logits(dtype, softcap, is_causal):
    """One key of a row takes everything, and the logits that lose underflow."""
    inputs = random_inputs(dtype, factor=300)
    results = run(inputs, is_causal=is_causal, softcap=softcap)
    assert all(x.isfinite().all() for x in results)
    visible = reference.causal_mask(70, 130)[None, None] if is_causal else None
    expected = reference.attention(*(x.detach().double() for x in inputs), None, visible, softcap=softcap)
    torch.testing.assert_close(results[1].double(), expected[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_up_to_the_largest(dtype):
    query, key, value = random_inputs(dtype)
    largest = torch.finfo(dtype).max
    value = torch.full_like(value, largest / 300).requires_grad_()
    out, lse, probs, *_ = run((query, key, value))
    assert all(x.isfinite().all() for x in (out, lse, probs))
    torch.testing.assert_close(out, torch.full_like(out, largest / 300))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", (1, 70))
def test_lowest_value_as_mask_bias(dtype, rows):
    """The additive convention: the lowest finite value hides a key as long as the row has another."""
    inputs = random_inputs(dtype)
    visible = torch.rand(2, 1, rows, 130, generator=make_generator(1)) < 0.5
    bias = torch.zeros(2, 1, rows, 130, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min).requires_grad_()
    results = run(inputs, attn_bias=bias)
    assert all(x.isfinite().all() for x in results)
    for x, expected in zip(results[:3], run(inputs, attn_mask=visible)[:3], strict=True):
        # A GPU rounds probabilities to the dtype, and each of the two relative to another number.
        tolerance = {"rtol": 0, "atol": max(4 * torch.finfo(x.dtype).eps, 1e-5)} if on_gpu() else {}
        torch.testing.assert_close(x, expected, **tolerance)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64))
@pytest.mark.parametrize("rows", (1, 70))
def test_lowest_value_for_every_key_is_no_mask(dtype, rows):
    """A finite bias masks nothing: beside the lowest value every logit vanishes, and the keys are alike."""
    inputs = random_inputs(dtype)
    bias = torch.full((1, 1, rows, 130), torch.finfo(dtype).min, dtype=dtype, requires_grad=True)
    out, lse, probs, *grads = run(inputs, attn_bias=bias)
    assert all(x.isfinite().all() for x in (out, lse, probs, *grads))
    mean = inputs[2].detach().double().mean(1, keepdim=True).repeat_interleave(2, dim=2).expand(out.shape)
    torch.testing.assert_close(out, mean.to(dtype), rtol=0, atol=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias_dtype", (torch.float32, None))
def test_large_biases(dtype, bias_dtype):
    """Biases at both ends of the range, one of each sign in every row."""
    bias_dtype = bias_dtype or dtype
    if dtype == torch.float64 and bias_dtype == torch.float32:
        pytest.skip("covered by float64 biases")
    inputs = random_inputs(dtype)
    largest = torch.finfo(bias_dtype).max
    bias = torch.zeros(1, 1, 1, 130, dtype=bias_dtype)
    bias[..., 7], bias[..., 100] = largest, -largest
    results = run(inputs, attn_bias=bias.requires_grad_())
    assert all(x.isfinite().all() for x in results)
    torch.testing.assert_close(results[0], inputs[2].detach()[:, 7:8].repeat_interleave(2, dim=2).expand(2, 70, 4, 24))


def no_key_cases():
    generator = make_generator(2)
    mask = torch.rand(2, 4, 70, 130, generator=generator) < 0.5
    mask[:, :, 3] = mask[1, 2, 40:] = False
    rows = (~mask).all(-1)
    yield "dense mask", {"attn_mask": mask}, rows
    yield "dense bias", {"attn_bias": torch.zeros(mask.shape).masked_fill(~mask, -math.inf).requires_grad_()}, rows
    every_row = torch.ones(2, 4, 70, dtype=torch.bool)
    yield "per-key mask", {"attn_mask": torch.zeros(1, 1, 1, 130, dtype=torch.bool)}, every_row
    yield "per-key bias", {"attn_bias": torch.full((1, 1, 1, 130), -math.inf, requires_grad=True)}, every_row
    score, padding = torch.randn(2, 2, 130, generator=generator), torch.arange(130) >= 100
    yield (
        "dynamic mask and padding",
        {"attn_mask": DynamicMask.from_score(score, 9, query_len=70, key_padding_mask=padding[None])},
        (torch.arange(70) + 60 < 100).expand(2, 4, 70),
    )
    everywhere = DynamicMask.from_score(torch.arange(130.0).expand(2, 1, 130), 9, is_causal=False, query_len=70)
    yield (
        "intersection",
        {"attn_mask": everywhere, "is_causal": True},
        (torch.arange(70) + 60 < 121).expand(2, 4, 70),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [name for name, *_ in no_key_cases()])
def test_rows_that_see_no_key(name, dtype):
    options, rows = next((options, rows) for found, options, rows in no_key_cases() if found == name)
    if "attn_bias" in options:
        options["attn_bias"] = options["attn_bias"].detach().to(dtype).requires_grad_()
    results = run(random_inputs(dtype), **options)
    out, lse, probs, grad_query, *grads = results
    assert rows.any()
    assert torch.equal(lse == -math.inf, rows)
    assert not any(x.isnan().any() for x in results)
    assert all(x.isfinite().all() for x in (out, probs, grad_query, *grads))
    for x in (out.transpose(1, 2), grad_query.transpose(1, 2), probs):
        assert not x[rows].any()
    if rows.all():
        assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("query_len, key_len", ((130, 70), (700, 1), (2, 1)))
def test_queries_before_the_first_key(query_len, key_len, dtype):
    out, lse, _, grad_query, *grads = run(random_inputs(dtype, query_len, key_len), is_causal=True)
    early = query_len - key_len
    assert not out[:, :early].any() and not grad_query[:, :early].any()
    assert (lse[:, :, :early] == -math.inf).all() and lse[:, :, early:].isfinite().all()
    assert all(x.isfinite().all() for x in (out, grad_query, *grads))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ("none", "causal", "mask", "per-key bias", "full bias", "dynamic mask", "window"))
@pytest.mark.parametrize("batch, query_len, key_len", ((0, 5, 5), (2, 0, 5), (2, 5, 0), (2, 0, 0), (0, 0, 0)))
def test_empty(batch, query_len, key_len, kind, dtype):
    inputs = random_inputs(dtype, query_len, key_len, batch=batch)
    options = {
        "none": dict,
        "causal": lambda: {"is_causal": True},
        "mask": lambda: {"attn_mask": torch.ones(batch, 2, query_len, key_len, dtype=torch.bool)},
        "per-key bias": lambda: {"attn_bias": torch.zeros(batch, 2, 1, key_len, dtype=dtype, requires_grad=True)},
        "full bias": lambda: {"attn_bias": torch.zeros(1, 1, query_len, key_len, dtype=dtype, requires_grad=True)},
        "dynamic mask": lambda: {
            "attn_mask": DynamicMask.from_score(torch.zeros(batch, 2, key_len, dtype=dtype), 3, query_len=query_len)
        },
        "window": lambda: {
            "attn_bias": torch.zeros(batch, 2, 1, key_len, dtype=dtype, requires_grad=True),
            "keep_window_size": 3,
        },
    }[kind]()
    out, lse, probs, *grads = run(inputs, **options)
    assert out.shape == inputs[0].shape and out.dtype == dtype and not out.any()
    assert lse.shape == (batch, 4, query_len) and (lse == -math.inf).all()
    assert probs.shape == (batch, 4, query_len, key_len)
    for x, grad in zip(inputs, grads, strict=False):
        assert grad.shape == x.shape and not grad.any()


def test_unaligned_memory():
    """Views that start anywhere give what aligned copies give."""
    generator = make_generator(4)
    storage = torch.randn(3, 1 + 90 * 2 * 17, generator=generator).to(usual_dtype())
    query, key, value = (x[1:].view(1, 90, 2, 17) for x in storage)
    bias = torch.randn(91, generator=generator)[1:].view(1, 1, 1, 90)
    mask = (torch.rand(90 * 90 + 1, generator=generator) < 0.5)[1:].view(1, 1, 90, 90)
    out = flash_dmattn_func(query, key, value, mask, bias)
    assert torch.equal(out, flash_dmattn_func(*(x.clone() for x in (query, key, value, mask, bias))))


def test_neighbours_are_left_alone():
    """Slices of larger tensors are read in place: what lies between and behind them may be anything, NaN as well."""
    inputs = random_inputs(usual_dtype())
    padded = [torch.full((2, x.shape[1] + 3, x.shape[2] + 1, x.shape[3] + 5), math.nan, dtype=x.dtype) for x in inputs]
    views = [p[:, 1:-2, :-1, 2:-3] for p in padded]
    for view, x in zip(views, inputs, strict=True):
        view.copy_(x.detach())
    for x, y in zip(run([v.requires_grad_() for v in views], is_causal=True), run(inputs, is_causal=True), strict=True):
        torch.testing.assert_close(x, y)
