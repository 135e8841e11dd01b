"""Every feature on every backend that can run here, against float64: the rows of the README's table.

    pytest tests/python/test_backends.py --record benchmarks/results/features_cpu.json
    python benchmarks/report.py

A row says yes of a backend if every test of the row passes there. What a backend does not take it has to refuse with
an error that says so, and the row says no.
"""

import functools
import itertools
import math

import pytest
import torch

import reference
from flash_dmattn import DynamicMask, backends, flash_dmattn_func_auto

B, H, HK, D = 2, 4, 2, 16
Q, K = 70, 100  # all sizes below fit into the same blocks: FlexAttention compiles for these
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def columns():
    """(backend, device) of what can run here."""
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    return [
        (name, device)
        for name, device in itertools.product(backends.BACKENDS, devices)
        if backends.load(name).MISSING is None
        and device in backends.load(name).DEVICES
        and backends.missing(name, device) is None
    ]


COLUMNS = columns()


@pytest.fixture(autouse=True, params=COLUMNS, ids=lambda column: "-".join(column))
def column(request, record_property):
    """Makes tensors on the column's device; leaves the row and the column to who records them (conftest.py)."""
    for row in request.node.iter_markers("row"):
        record_property("feature", (row.args[0], *request.param))
    torch.manual_seed(0)
    with torch.device(request.param[1]):
        yield request.param


def dtype_of(column):
    """What the backend is most exact in, of the usual ones."""
    takes = backends.load(column[0]).DTYPES
    return torch.float32 if torch.float32 in takes else torch.bfloat16


def inputs(dtype, query_len=Q, key_len=K, heads=H, kv_heads=HK, head_dim=D, batch=B):
    sizes = (query_len, heads), (key_len, kv_heads), (key_len, kv_heads)
    return [torch.randn(batch, *size, head_dim).to(dtype) for size in sizes]


def near(x, exact, dtype, name):
    assert x.shape == exact.shape, name
    x, exact = x.double(), exact.double()
    assert not x.isnan().any(), name
    largest = float(exact[exact.isfinite()].abs().max()) if exact.isfinite().any() else 0.0
    difference = (x - exact).masked_fill(x == exact, 0).abs().max() if x.numel() else 0.0
    assert float(difference) <= TOLERANCE[dtype] * max(1.0, largest), f"{name} differs by {float(difference):.2g}"


def check(column, tensors, bias=None, visible=None, *, view=lambda bias: bias, scale=None, softcap=None, **options):
    """out, lse, probs and all gradients, through out and lse, against float64. `view`: how the bias is passed."""
    attention = flash_dmattn_func_auto(backend=column[0])
    leaves = [x.detach().requires_grad_() for x in (*tensors, bias) if x is not None]
    exact_leaves = [x.detach().double().requires_grad_() for x in leaves]
    attn_bias = view(leaves[3]) if bias is not None else None
    out, lse, probs = attention(
        *leaves[:3], attn_bias=attn_bias, scale=scale, softcap=softcap, return_attn_probs=True, **options
    )
    expected = reference.attention(
        *exact_leaves[:3], bias=None if bias is None else exact_leaves[3], visible=visible, scale=scale, softcap=softcap
    )
    dtype = tensors[0].dtype
    assert out.dtype == probs.dtype == dtype and out.device == tensors[0].device and not probs.requires_grad
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for name, x, exact in zip(("out", "lse", "probs"), (out, lse, probs), expected, strict=True):
        near(x.detach(), exact.detach(), dtype, name)
    grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse)
    grads = torch.autograd.grad((out, lse), leaves, (grad_out, grad_lse))
    exact_grads = torch.autograd.grad(expected[:2], exact_leaves, (grad_out.double(), grad_lse.double()))
    for name, grad, exact in zip(("query", "key", "value", "bias"), grads, exact_grads, strict=False):
        near(grad, exact, dtype, f"gradient of {name}")
    # Without gradients it is the same answer.
    with torch.no_grad():
        again = attention(*leaves[:3], attn_bias=attn_bias, scale=scale, softcap=softcap, **options)
    near(again, expected[0].detach(), dtype, "out without gradients")
    return out


SHAPES = list(itertools.product((1, B), (1, HK, H), (1, Q), (1, K)))


@pytest.mark.row("Mask of any broadcast shape `(B \\| 1, 1 \\| Hk \\| H, 1 \\| Q, 1 \\| K)`, bool or numbers")
@pytest.mark.row("Bias of any broadcast shape, its gradient in the same shape")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_broadcast_shapes(column, shape):
    """Of both at once: each combination is a kernel to compile."""
    dtype = dtype_of(column)
    mask, bias = torch.rand(shape) > 0.3, torch.randn(shape)
    mask_argument = mask if shape[0] == 1 else mask.float()
    check(column, inputs(dtype), bias, mask.expand(-1, -1, Q, K), attn_mask=mask_argument)


@pytest.mark.row("Mask of any broadcast shape `(B \\| 1, 1 \\| Hk \\| H, 1 \\| Q, 1 \\| K)`, bool or numbers")
@pytest.mark.parametrize("mask_dtype", (torch.bool, torch.uint8, torch.int64, torch.bfloat16))
def test_mask_dtypes(column, mask_dtype):
    mask = torch.rand(B, 1, Q, K) > 0.3
    check(column, inputs(dtype_of(column)), visible=mask, attn_mask=mask.to(mask_dtype))


@pytest.mark.row("Masks and biases expanded over queries, read in place")
def test_expanded(column):
    dtype = dtype_of(column)
    bias, mask = torch.randn(B, HK, 1, K), torch.rand(B, 1, 1, K) > 0.3
    tensors = inputs(dtype)
    check(
        column, tensors, bias, mask.expand(-1, -1, Q, -1), view=lambda bias: bias.expand(-1, -1, Q, -1),
        attn_mask=mask.expand(-1, -1, Q, -1),
    )  # fmt: skip
    if column[1] == "cuda":
        length = 16384
        tensors = inputs(dtype, length, length, heads=1, kv_heads=1, batch=1)
        bias, mask = torch.randn(1, 1, 1, length), torch.arange(length) < 300
        attention = functools.partial(flash_dmattn_func_auto(backend=column[0]), *tensors)
        attention(attn_bias=bias, attn_mask=mask[None, None, None])
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        attention(attn_bias=bias.expand(-1, -1, length, -1), attn_mask=mask.expand(1, 1, length, length))
        assert torch.cuda.max_memory_allocated() - before < length * length / 8


@pytest.mark.row("A bias of −∞ masks its key")
def test_infinite_bias(column):
    bias = torch.randn(1, HK, 1, K).masked_fill(torch.rand(1, HK, 1, K) < 0.3, -math.inf)
    check(column, inputs(dtype_of(column)), bias)


@pytest.mark.row("Grouped KV heads")
@pytest.mark.parametrize("heads, kv_heads", ((4, 1), (4, 4)))
def test_grouped_heads(column, heads, kv_heads):
    check(column, inputs(dtype_of(column), heads=heads, kv_heads=kv_heads))


@pytest.mark.row("Backward: gradients of query, key and value")
@pytest.mark.row("Causal, aligned to the bottom right, Q ≠ K")
@pytest.mark.parametrize("query_len, key_len", ((1, 70), (70, 100), (100, 100), (100, 33), (2, 1)))
def test_causal(column, query_len, key_len):
    visible = reference.causal_mask(query_len, key_len)[None, None]
    check(column, inputs(dtype_of(column), query_len, key_len), visible=visible, scale=0.3, is_causal=True)


@pytest.mark.row("Softcap")
@pytest.mark.parametrize("has_bias", (False, True))
def test_softcap(column, has_bias):
    bias = torch.randn(B, H, Q, K) if has_bias else None
    visible = reference.causal_mask(Q, K)[None, None]
    check(column, inputs(dtype_of(column)), bias, visible, softcap=1.5, is_causal=True)


@pytest.mark.row("`DynamicMask`")
@pytest.mark.parametrize("heads", (1, HK, H))
@pytest.mark.parametrize("is_causal, selects_causally", ((None, True), (None, False), (True, False)))
def test_dynamic_mask(column, heads, is_causal, selects_causally):
    score = torch.randn(B, heads, K).mul(2).round()
    padding = torch.rand(B, K) > 0.2
    mask = DynamicMask.from_score(score, 20, query_len=Q, is_causal=selects_causally, key_padding_mask=padding)
    visible = reference.dynamic_mask(score, 20, Q, selects_causally, padding)
    if is_causal:
        visible = visible & reference.causal_mask(Q, K)
    bias = score[:, :, None] / 2
    check(column, inputs(dtype_of(column)), bias, visible, attn_mask=mask, is_causal=is_causal)


@pytest.mark.row("`DynamicMask`")
def test_long_dynamic_mask(column):
    """Long enough for lists of keys, on backends that make some, with queries that do not start with a tile."""
    query_len, key_len = 600, 2100
    dtype = dtype_of(column)
    tensors = inputs(dtype, query_len, key_len, batch=1)
    score = torch.randn(1, HK, key_len)
    mask = DynamicMask.from_score(score, 40, query_len=query_len)
    check(column, tensors, score[:, :, None], mask.to_dense(), attn_mask=mask)


@pytest.mark.row("`keep_window_size`")
@pytest.mark.parametrize("kind", ("per_key", "padded", "per_query", "dense"))
def test_keep_window_size(column, kind):
    bias = torch.randn(B, HK, Q if kind == "per_query" else 1, K)
    shapes = {"padded": (B, 1, 1, K), "dense": (1, HK, Q, K)}
    mask = torch.rand(shapes[kind]) > 0.3 if kind in shapes else None
    visible = reference.causal_mask(Q, K).expand(B, HK, Q, K)
    visible = visible if mask is None else visible & mask
    visible = reference.select_rows(bias.expand(-1, -1, Q, -1), visible, 20)
    tensors = inputs(dtype_of(column))
    check(column, tensors, bias, visible, attn_mask=mask, is_causal=True, keep_window_size=20)


@pytest.mark.row("A query that sees no key gives 0, lse −∞ and gradients of 0")
@pytest.mark.parametrize("kind", ("mask", "bias", "causal"))
def test_rows_that_see_nothing(column, kind):
    query_len, key_len = (Q, K) if kind != "causal" else (Q, 20)
    mask = torch.rand(B, 1, query_len, key_len) > 0.3
    mask[1, :, 3:9] = False
    bias, options, visible = torch.randn(mask.shape), {"attn_mask": mask}, mask
    if kind == "bias":
        mask = mask[:, :, 3:4]  # no query of one batch entry sees anything
        bias = torch.zeros(mask.shape).masked_fill(~mask, -math.inf)
        visible, options = mask, {}
    elif kind == "causal":
        bias, options = None, {"is_causal": True}
        visible = reference.causal_mask(query_len, key_len)[None, None]
    out = check(column, inputs(dtype_of(column), query_len, key_len), bias, visible, **options)
    nothing = ~visible.expand(B, H, query_len, key_len).any(-1)
    assert nothing.any() and (out.transpose(1, 2)[nothing] == 0).all()


@pytest.mark.row("`return_attn_probs`: lse, with gradient, and probabilities")
def test_probabilities(column):
    visible = reference.causal_mask(Q, K)[None, None]
    check(column, inputs(dtype_of(column)), visible=visible, is_causal=True)


@pytest.mark.row("`deterministic`: the same bits forward and backward, gradient of the bias included")
@pytest.mark.parametrize("kind", ("per_key", "dense", "softcap", "dynamic"))
def test_deterministic(column, kind):
    on_gpu = column[1] == "cuda"
    query_len, key_len = (1100, 2100) if on_gpu else (Q, K)
    tensors = inputs(dtype_of(column), query_len, key_len)
    bias = torch.randn(1, HK, query_len if kind == "dense" else 1, key_len)
    visible = reference.causal_mask(query_len, key_len)[None, None]
    options = {"is_causal": True, "deterministic": True, "softcap": 2.0 if kind == "softcap" else None}
    if kind == "dynamic":
        options["keep_window_size"] = 40
        visible = reference.dynamic_mask(bias[:, :, 0], 40, query_len)
    check(column, tensors, bias, visible, **options)
    leaves = [x.requires_grad_() for x in (*tensors, bias)]
    results = []
    for _ in range(5 if on_gpu else 2):
        out = flash_dmattn_func_auto(backend=column[0])(*leaves[:3], attn_bias=leaves[3], **options)
        results.append((out, *torch.autograd.grad(out, leaves, tensors[0])))
    for again in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], again, strict=True))


@pytest.mark.row("Empty tensors")
@pytest.mark.parametrize("batch, query_len, key_len", ((0, 3, 4), (2, 0, 4), (2, 3, 0)))
def test_empty(column, batch, query_len, key_len):
    tensors = [x.requires_grad_() for x in inputs(dtype_of(column), query_len, key_len, batch=batch)]
    bias = torch.randn(1, HK, 1, key_len).requires_grad_()
    out, lse, probs = flash_dmattn_func_auto(backend=column[0])(*tensors, attn_bias=bias, return_attn_probs=True)
    assert torch.equal(out, torch.zeros_like(tensors[0]))
    assert torch.equal(lse, torch.full((batch, H, query_len), -math.inf))
    assert probs.shape == (batch, H, query_len, key_len)
    grads = torch.autograd.grad((out, lse), (*tensors, bias), (torch.ones_like(out), torch.ones_like(lse)))
    assert all(torch.equal(grad, torch.zeros_like(x)) for grad, x in zip(grads, (*tensors, bias), strict=True))


DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@pytest.mark.parametrize("dtype", [
    pytest.param(dtype, id=str(dtype)[6:], marks=pytest.mark.row(str(dtype).removeprefix("torch."))) for dtype in DTYPES
])  # fmt: skip
def test_dtypes(column, dtype):
    tensors = inputs(dtype)
    bias = torch.randn(1, HK, 1, K, dtype=torch.promote_types(dtype, torch.float32))
    if dtype not in backends.load(column[0]).DTYPES:
        with pytest.raises(TypeError, match=f"query is {str(dtype)[6:]}; it takes float16 or bfloat16"):
            flash_dmattn_func_auto(backend=column[0])(*tensors)
        pytest.skip(f"the {column[0]} backend refuses {dtype}")
    visible = reference.causal_mask(Q, K)[None, None]
    check(column, tensors, bias, visible, is_causal=True)


@pytest.mark.row("Head dims from 1 to 256, any strides")
@pytest.mark.parametrize("head_dim", (1, 40, 256))
def test_head_dims(column, head_dim):
    dtype = dtype_of(column)
    query, key, value = inputs(dtype, head_dim=head_dim + 3)
    heads_first = key.transpose(1, 2).contiguous().transpose(1, 2)
    check(column, [query[..., 1:-2], heads_first[..., :-3], value[:, :, :, 3:]])


def test_backends_agree(column):
    """The same call, on each backend of the device."""
    others = [name for name, device in COLUMNS if device == column[1] and name != column[0]]
    dtype = torch.bfloat16
    tensors, bias = inputs(dtype), torch.randn(1, HK, 1, K)
    options = {"attn_bias": bias, "is_causal": True, "keep_window_size": 30, "return_attn_probs": True}
    results = flash_dmattn_func_auto(backend=column[0])(*tensors, **options)
    for other in others:
        for name, x, y in zip(
            ("out", "lse", "probs"), results, flash_dmattn_func_auto(backend=other)(*tensors, **options), strict=True
        ):
            near(x, y, dtype, f"{name} of {other}")
