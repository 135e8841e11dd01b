"""The Triton backend: on a GPU if there is one; with TRITON_INTERPRET=1 on the CPU, in sizes that suit Triton's
interpreter. `make test` does the latter."""

import math
import os

import pytest
import torch

import covering
import reference
import test_attention
import test_determinism
import test_numerics
from devices import generator as make_generator
from flash_dmattn import TRITON_AVAILABLE, selection, triton_dmattn_func

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(not TRITON_AVAILABLE, reason="needs a GPU, or TRITON_INTERPRET=1")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

FACTORS = {**test_attention.FACTORS, "dtype": DTYPES}
if INTERPRETED:
    FACTORS |= {
        "lengths": ((1, 1), (1, 65), (1, 300), (2, 2), (3, 64), (63, 63), (65, 65), (64, 257), (129, 63), (33, 140)),
        "head_dim": (1, 7, 16, 33, 64),
        "heads": ((1, 1), (4, 2), (3, 1), (6, 2)),
    }
CASES = covering.covering_array(FACTORS, test_attention.fits)


@pytest.fixture(autouse=True)
def device(monkeypatch):
    """Tensors are made there, and masks as a GPU has them: with survivors."""
    if INTERPRETED:
        monkeypatch.setattr("flash_dmattn.dynamic_mask._maker", lambda score: selection)
    with torch.device("cpu" if INTERPRETED else "cuda"):
        yield


@pytest.fixture
def as_the_engine(monkeypatch):
    """Tests of the engine test this backend."""
    for module in (test_numerics, test_determinism):
        monkeypatch.setattr(module, "flash_dmattn_func", triton_dmattn_func)
        monkeypatch.setattr(module, "on_gpu", lambda: True)  # with the tolerances of kernels on tensor cores


@pytest.mark.parametrize("case", CASES, ids=test_attention.label)
def test_pairs(case):
    test_attention.check(case, CASES.index(case), triton_dmattn_func)


# What has many runs, tiles and chunks of survivors.
LONG = {
    "dynamic": {"mask": "dynamic", "window": "few", "mask_heads": "kv", "bias": "per_key", "bias_heads": "kv"},
    "dynamic, one head": {"mask": "dynamic_padded", "mask_batch": "one", "mask_heads": "one", "window": "half"},
    "dynamic, a mask for each query head": {"mask": "dynamic", "window": "few", "mask_heads": "query"},
    "not causal": {"mask": "dynamic_everywhere", "window": "few", "mask_heads": "kv", "is_causal": False},
    "intersection": {"mask": "dynamic_everywhere", "window": "few", "mask_heads": "kv"},
    "dense": {"mask": "dense", "mask_heads": "one", "mask_batch": "one", "mask_dtype": torch.bool},
    "causal": {"mask": None, "bias": "per_key", "bias_heads": "query", "bias_dtype": "float32"},
    "full bias": {"mask": None, "bias": "full", "bias_heads": "one"},
    "best of each row": {"mask": "keep_dense", "window": "few", "bias": "full", "bias_heads": "kv"},
}


@pytest.mark.parametrize("deterministic", (None, True))
@pytest.mark.parametrize("lengths, heads", (((40, 600), (8, 1)), ((1100, 1100), (4, 2)), ((300, 900), (3, 1))))
@pytest.mark.parametrize("name", LONG)
def test_long(name, lengths, heads, deterministic):
    if INTERPRETED and (lengths != (40, 600) or not deterministic):
        pytest.skip("takes long")
    case = dict.fromkeys(FACTORS) | {"layout": "contiguous", "is_causal": True, "grad_lse": True, "head_dim": 16}
    case |= LONG[name] | {"lengths": lengths, "heads": heads, "dtype": torch.float32, "deterministic": deterministic}
    defaults = {"bias_heads": "one", "bias_batch": "one", "bias_dtype": "query's", "bias_inf": False}
    if case["mask"] in test_attention.TENSOR_MASKS:
        defaults |= {"mask_heads": "one", "mask_batch": "one", "mask_dtype": torch.bool}
    test_attention.check(case | {k: v for k, v in defaults.items() if case[k] is None}, 0, triton_dmattn_func)


@pytest.mark.skipif(INTERPRETED, reason="programs come one after the other")
@pytest.mark.parametrize("kind", ("causal", "decode", "per_key_bias", "full_bias", "dense_mask", "dynamic_mask"))
def test_same_bits(kind, as_the_engine):
    test_determinism.test_same_bits(kind, torch.bfloat16, None)


@pytest.mark.parametrize("dtype", (torch.bfloat16,) if INTERPRETED else DTYPES)
def test_numbers(dtype, as_the_engine):
    test_numerics.test_large_logits(dtype, 30.0, True)
    test_numerics.test_values_up_to_the_largest(dtype)
    # Few cases where they take long.
    for rows in (1,) if INTERPRETED else (1, 70):
        test_numerics.test_lowest_value_as_mask_bias(dtype, rows)
        if dtype != torch.float16:
            test_numerics.test_lowest_value_for_every_key_is_no_mask(dtype, rows)
    test_numerics.test_large_biases(dtype, torch.float32)


@pytest.mark.parametrize("batch, query_len, key_len", ((0, 3, 4), (2, 0, 4), (2, 3, 0)))
def test_empty(batch, query_len, key_len):
    query = torch.randn(batch, query_len, 4, 16, requires_grad=True)
    key, value = (torch.randn(batch, key_len, 2, 16, requires_grad=True) for _ in range(2))
    bias = torch.randn(1, 1, 1, key_len, requires_grad=True)
    out, lse, probs = triton_dmattn_func(query, key, value, None, bias, return_attn_probs=True)
    assert torch.equal(out, torch.zeros(batch, query_len, 4, 16))
    assert torch.equal(lse, torch.full((batch, 4, query_len), -math.inf))
    assert probs.shape == (batch, 4, query_len, key_len)
    for leaf, grad in zip(
        (query, key, value, bias), torch.autograd.grad(out.sum(), (query, key, value, bias)), strict=True
    ):
        assert grad.shape == leaf.shape and not grad.any()


def test_rows_that_see_nothing():
    """Of whole tiles, of a tile, and before every key."""
    query_len, key_len = 200, 90
    generator = make_generator(0)
    leaves = [
        torch.randn(1, length, heads, 16, generator=generator).requires_grad_()
        for length, heads in ((query_len, 4), (key_len, 2), (key_len, 2))
    ]
    mask = torch.rand(1, 2, query_len, key_len, generator=generator) < 0.3
    mask[:, 1, 10:60] = mask[:, :, 130:] = mask[:, :, :, 40:75] = False
    for attn_mask, is_causal in ((None, True), (mask, False), (mask, True), (torch.zeros(1, 1, 1, key_len), False)):
        visible = torch.ones(1, 1, query_len, key_len, dtype=torch.bool) if attn_mask is None else attn_mask != 0
        if is_causal:
            visible = visible & reference.causal_mask(query_len, key_len)
        out, lse, probs = triton_dmattn_func(*leaves, attn_mask, is_causal=is_causal, return_attn_probs=True)
        sees_nothing = (~reference.expand_heads(visible, 4)).all(-1).expand(1, 4, query_len)
        assert sees_nothing.any()
        assert torch.equal(lse == -math.inf, sees_nothing)
        assert not out.transpose(1, 2)[sees_nothing].any() and not probs[sees_nothing].any()
        grads = torch.autograd.grad(out.sum() + lse.masked_fill(sees_nothing, 0).sum(), leaves)
        assert all(grad.isfinite().all() for grad in grads)
        assert not grads[0].transpose(1, 2)[sees_nothing].any()


def test_float64_is_refused():
    query = torch.randn(1, 3, 2, 8, dtype=torch.float64)
    with pytest.raises(TypeError, match="query is float64; it takes float16 or bfloat16 or float32"):
        triton_dmattn_func(query, query, query)


def test_no_double_backward():
    query = torch.randn(1, 3, 2, 8, requires_grad=True)
    out = triton_dmattn_func(query, query, query)
    (grad,) = torch.autograd.grad(out.sum(), query, create_graph=True)
    with pytest.raises(NotImplementedError, match="no double backward"):
        grad.sum().backward()


@pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter cannot be captured")
@pytest.mark.parametrize("query_len", (1, 600))
def test_cuda_graph(query_len):
    """Nothing waits for the device, so all of it can be captured: masks, forward and backward."""
    generator = make_generator(0)
    query = torch.randn(1, query_len, 4, 64, generator=generator).bfloat16().requires_grad_()
    key, value = (torch.randn(1, 600, 2, 64, generator=generator).bfloat16().requires_grad_() for _ in range(2))
    bias = torch.randn(1, 2, 1, 600, generator=generator).requires_grad_()
    mask = torch.rand(1, 2, query_len, 600, generator=generator) < 0.5

    def step():
        outs = (
            triton_dmattn_func(query, key, value, None, bias, is_causal=True, keep_window_size=50, deterministic=True),
            triton_dmattn_func(query, key, value, mask, bias, deterministic=True),
        )
        return [*outs, *torch.autograd.grad(sum(out.sum() for out in outs), (query, key, value, bias))]

    # Leaves belong to the stream of their first use, which has to wait for what made them.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    for x in got:
        x.zero_()
    graph.replay()
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))


@pytest.mark.skipif(INTERPRETED, reason="what is compiled is not Triton's interpreter")
def test_torch_compile():
    generator = make_generator(0)
    leaves = [torch.randn(1, 200, heads, 64, generator=generator).bfloat16().requires_grad_() for heads in (4, 2, 2)]
    bias = torch.randn(1, 2, 1, 200, generator=generator).requires_grad_()

    def step(query, key, value, bias):
        return triton_dmattn_func(query, key, value, None, bias, is_causal=True, keep_window_size=50) * 2

    results = []
    for function in (step, torch.compile(step, fullgraph=True)):
        out = function(*leaves, bias)
        results.append([out, *torch.autograd.grad(out.float().square().sum(), (*leaves, bias))])
    torch.testing.assert_close(*results, rtol=2e-2, atol=2e-2)
