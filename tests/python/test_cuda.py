"""What only a GPU has: long sequences, streams, graphs, devices, more than 2^31 elements, memory that is measured."""

import math
import threading
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from devices import DEVICES, generator, poison
from flash_dmattn import TRITON_AVAILABLE, DynamicMask, flash_dmattn_func, flash_dmattn_func_auto
from flash_dmattn.api import _best_backend
from flash_dmattn.backends import cuda
from flash_dmattn.problem import make_problem

if "cuda" not in DEVICES:
    pytest.skip("there is no GPU with CUDA kernels", allow_module_level=True)


@pytest.fixture(autouse=True)
def on_the_gpu():
    with torch.device("cuda"):
        poison()
        yield


def random(seed, *size, dtype=torch.bfloat16):
    return torch.randn(size, generator=generator(seed), dtype=torch.float32).to(dtype)


def leaves(*tensors):
    return [tensor.detach().requires_grad_() for tensor in tensors]


def relative_error(x, exact):
    assert not x.isnan().any()
    return float((x.double() - exact).norm() / exact.norm())


@dataclass
class OneHead:
    """Attention of the query heads that read one KV head, from the definition, some queries at a time: query
    (Q, G, D), key and value (K, D), bias (K,) or (Q, K), visible(rows) (R, K) bool. Sums over queries are float64."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    grad_out: torch.Tensor
    visible: object
    bias: torch.Tensor | None = None
    softcap: float | None = None

    def run(self, dtype=torch.float64, rows=None, chunk=512):
        """out, lse and the gradients of query, key, value and a per-key bias, or of all of a bias's sampled rows."""
        key, value = self.key.to(dtype), self.value.to(dtype)
        scale, key_len = key.size(1) ** -0.5, key.size(0)
        rows = torch.arange(self.query.size(0)) if rows is None else rows
        outs, lses, grad_queries, grad_biases = [], [], [], []
        grad_key, grad_value = (torch.zeros(x.shape, dtype=torch.float64) for x in (key, value))
        grad_per_key = torch.zeros(key_len, dtype=torch.float64)
        for part in rows.split(chunk):
            query, grad_out = (x[part].to(dtype).transpose(0, 1) for x in (self.query, self.grad_out))  # (G, R, D)
            s = query @ key.T * scale
            if self.softcap is not None:
                capped = torch.tanh(s / self.softcap)
                s = capped * self.softcap
            if self.bias is not None:
                s = s + (self.bias if self.bias.dim() == 1 else self.bias[part]).to(dtype)
            s = s.masked_fill(~self.visible(part), -math.inf)
            probs = torch.softmax(s, -1).nan_to_num(0)  # NaN where a query sees no key
            out = probs @ value
            grad_s = probs * (grad_out @ value.T - (grad_out * out).sum(-1, keepdim=True))
            grad_value += (probs.flatten(0, 1).T @ grad_out.flatten(0, 1)).double()
            if self.bias is not None and self.bias.dim() == 1:
                grad_per_key += grad_s.sum((0, 1), dtype=torch.float64)
            elif self.bias is not None:
                grad_biases.append(grad_s.sum(0))
            if self.softcap is not None:
                grad_s = grad_s * (1 - capped * capped)
            grad_key += (grad_s.flatten(0, 1).T @ query.flatten(0, 1)).double() * scale
            grad_queries.append((grad_s @ key * scale).transpose(0, 1))
            outs.append(out.transpose(0, 1))
            lses.append(torch.logsumexp(s, -1))
        results = {"out": torch.cat(outs), "lse": torch.cat(lses, 1), "query": torch.cat(grad_queries)}
        if len(rows) == self.query.size(0):
            results |= {"key": grad_key, "value": grad_value}
        if self.bias is not None and self.bias.dim() == 1 and len(rows) == self.query.size(0):
            results["bias"] = grad_per_key
        elif grad_biases:
            results["bias"] = torch.cat(grad_biases)
        return {name: x.double() for name, x in results.items()}


def causal(query_len, key_len):
    position = torch.arange(key_len)
    return lambda rows: position <= rows[:, None] + key_len - query_len


def dynamic(mask):
    """Of the last head of a DynamicMask."""
    _, _, query_len, key_len = mask.shape
    return lambda rows: causal(query_len, key_len)(rows) & (rows[:, None] + key_len - query_len < mask.end[0, -1])


def check_head(actual, head, peer=None, rows=None):
    """Every result of one KV head: the error at most twice that of a peer, by default plain torch in the dtype."""
    exact = head.run(rows=rows)
    peer = head.run(head.query.dtype, rows=rows) if peer is None else peer
    for name, x in actual.items():
        if name == "lse":
            torch.testing.assert_close(x.double(), exact[name], rtol=1e-5, atol=1e-4)
            continue
        error, allowed = relative_error(x, exact[name]), 2 * relative_error(peer[name], exact[name])
        assert error <= min(allowed, 2e-2) + 2e-4, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


LONG = {  # query_len, key_len, heads, kv_heads, head_dim, w, dtype
    "4096": (4096, 4096, 4, 2, 128, 512, torch.bfloat16),
    "4096-float16": (4096, 4096, 4, 4, 64, 300, torch.float16),
    "16384": (16384, 16384, 2, 1, 128, 1024, torch.bfloat16),
    "65536": (65536, 65536, 2, 1, 128, 1024, torch.bfloat16),
    "65536-wide": (65536, 65536, 2, 2, 64, 4096, torch.bfloat16),
    "short-queries": (1000, 65536, 4, 2, 96, 2048, torch.bfloat16),
    "many-heads": (8192, 8192, 8, 1, 128, 512, torch.bfloat16),
}


@pytest.mark.parametrize("kind", ("causal", "dynamic", "bias", "per_key_mask", "softcap"))
@pytest.mark.parametrize("size", LONG.values(), ids=LONG)
def test_long_sequences(size, kind):
    query_len, key_len, heads, kv_heads, head_dim, w, dtype = size
    group = heads // kv_heads
    query, grad_out = (random(seed, 1, query_len, heads, head_dim, dtype=dtype) for seed in (0, 1))
    key, value = (random(seed, 1, key_len, kv_heads, head_dim, dtype=dtype) for seed in (2, 3))
    bias = random(4, 1, kv_heads, 1, key_len, dtype=torch.float32)
    options = {"causal": {}, "softcap": {"softcap": 3.0}}.get(kind, {"attn_bias": bias.requires_grad_()})
    visible = causal(query_len, key_len)
    if kind == "dynamic":
        mask = DynamicMask.from_score(bias.detach()[:, :, 0], w, query_len=query_len)
        options["attn_mask"], visible = mask, dynamic(mask)
    elif kind == "per_key_mask":
        mask = torch.rand(1, 1, 1, key_len, generator=generator(5)) < 0.1
        mask[..., 0] = True
        options["attn_mask"], visible = mask, lambda rows: causal(query_len, key_len)(rows) & mask[0, 0, 0]

    inputs = leaves(query, key, value)
    poison(512)
    out, lse = attention_with_lse(*inputs, is_causal=True, **options)
    poison(512)
    wanted = [*inputs, bias] if "attn_bias" in options else inputs
    grads = torch.autograd.grad(out, wanted, grad_out)
    heads_of_last = slice(heads - group, heads)
    actual = {
        "out": out[0, :, heads_of_last].detach(),
        "lse": lse[0, heads_of_last].detach(),
        "query": grads[0][0, :, heads_of_last],
        "key": grads[1][0, :, -1],
        "value": grads[2][0, :, -1],
    }
    if "attn_bias" in options:
        actual["bias"] = grads[3][0, -1, 0]
    head = OneHead(
        query[0, :, heads_of_last], key[0, :, -1], value[0, :, -1], grad_out[0, :, heads_of_last], visible,
        bias.detach()[0, -1, 0] if "attn_bias" in options else None, options.get("softcap"),
    )  # fmt: skip
    peer = None
    if kind == "causal" and query_len == key_len:
        peer = scaled_dot_product_attention(query, key, value, grad_out, group)
    check_head(actual, head, peer)


def attention_with_lse(*inputs, **options):
    """Without the probabilities, which are as large as queries times keys."""
    names = ("attn_mask", "attn_bias", "scale", "is_causal", "softcap", "deterministic", "keep_window_size")
    return cuda.attention_with_lse(make_problem(*inputs, *(options.get(name) for name in names)))


def scaled_dot_product_attention(query, key, value, grad_out, group):
    """What torch's own gives for the last KV head."""
    inputs = leaves(*(x.transpose(1, 2) for x in (query, key, value)))
    out = F.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)
    grads = torch.autograd.grad(out, inputs, grad_out.transpose(1, 2))
    return {
        "out": out[0, -group:].detach().transpose(0, 1),
        "query": grads[0][0, -group:].transpose(0, 1),
        "key": grads[1][0, -1],
        "value": grads[2][0, -1],
    }


@pytest.mark.parametrize("head_dim", (8, 24, 56, 72, 96, 120, 136, 192, 248))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_head_dims(head_dim, dtype):
    length = 700
    query, grad_out = (random(seed, 1, length, 2, head_dim, dtype=dtype) for seed in (0, 1))
    key, value = (random(seed, 1, length, 1, head_dim, dtype=dtype) for seed in (2, 3))
    inputs = leaves(query, key, value)
    out, lse = attention_with_lse(*inputs, is_causal=True)
    grads = torch.autograd.grad(out, inputs, grad_out)
    actual = {"out": out[0].detach(), "lse": lse[0].detach(), "query": grads[0][0]}
    actual |= {"key": grads[1][0, :, 0], "value": grads[2][0, :, 0]}
    head = OneHead(query[0], key[0, :, 0], value[0, :, 0], grad_out[0], causal(length, length))
    check_head(actual, head)


@pytest.mark.parametrize("broadcast", ((), (0,), (1,), (2,), (1, 2)))
def test_full_bias(broadcast):
    """Gradients are summed over what the bias is broadcast over; here by many blocks."""
    batch, length, heads, kv_heads, head_dim = 2, 1500, 4, 2, 64
    query, grad_out = (random(seed, batch, length, heads, head_dim) for seed in (0, 1))
    key, value = (random(seed, batch, length, kv_heads, head_dim) for seed in (2, 3))
    size = [1 if dim in broadcast else n for dim, n in enumerate((batch, heads, length, length))]
    bias = random(4, *size, dtype=torch.float32).requires_grad_()
    out = flash_dmattn_func(query, key, value, attn_bias=bias, is_causal=True)
    (grad,) = torch.autograd.grad(out, bias, grad_out)
    exact = torch.zeros(size, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            at = [0 if n == 1 else i for n, i in zip(size, (b, h), strict=False)]
            rows = bias.detach()[at[0], at[1]].expand(length, length)
            one = OneHead(
                query[b, :, h, None], key[b, :, h // 2], value[b, :, h // 2], grad_out[b, :, h, None],
                causal(length, length), rows,
            )  # fmt: skip
            grad_rows = one.run()["bias"]
            exact[at[0], at[1]] += grad_rows.sum(0, keepdim=True) if size[2] == 1 else grad_rows
    assert relative_error(grad, exact) < 1e-2


@pytest.mark.parametrize("query_len", (1, 3, 16))
@pytest.mark.parametrize("kind", ("dynamic", "bias", "dense"))
@pytest.mark.parametrize("key_len", (5000, 524288))
def test_decode(query_len, kind, key_len):
    heads, kv_heads, head_dim, w = 8, 2, 128, 1024
    query = random(0, 1, query_len, heads, head_dim)
    key, value = (random(seed, 1, key_len, kv_heads, head_dim) for seed in (1, 2))
    bias = random(3, 1, kv_heads, 1, key_len, dtype=torch.float32)
    options, visible = {"attn_bias": bias}, causal(query_len, key_len)
    if kind == "dynamic":
        mask = DynamicMask.from_score(bias[:, :, 0], w, query_len=query_len)
        options["attn_mask"], visible = mask, dynamic(mask)
    elif kind == "dense":
        options = {}
    out, lse = attention_with_lse(query, key, value, is_causal=True, **options)
    head = OneHead(
        query[0, :, -4:], key[0, :, -1], value[0, :, -1], query[0, :, -4:], visible,
        bias[0, -1, 0] if "attn_bias" in options else None,
    )  # fmt: skip
    check_head({"out": out[0, :, -4:], "lse": lse[0, -4:]}, head)


@pytest.mark.parametrize("w", (64, 1024, 2048, 5000))
@pytest.mark.parametrize("levels", (3, 256, None))
def test_masks_are_those_of_the_cpu(w, levels):
    """At a length where a mask is made by many blocks."""
    score = random(0, 2, 3, 40000, dtype=torch.float32)
    if levels:
        score = (score * levels / 4).round()
    padding = torch.rand(2, 40000, generator=generator(1)) < 0.9
    for options in ({}, {"key_padding_mask": padding}, {"is_causal": False}, {"query_len": 7}):
        mask = DynamicMask.from_score(score, w, **options)
        options = {name: x.cpu() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
        assert torch.equal(mask.end.cpu(), DynamicMask.from_score(score.cpu(), w, **options).end)


def test_rows_of_their_own():
    """(B, heads, Q, K) scores: the same keys as on the CPU."""
    score = (random(0, 1, 2, 500, 3000, dtype=torch.float32) * 20).round()
    visible = torch.rand(1, 2, 500, 3000, generator=generator(1)) < 0.8
    for is_causal in (False, True):
        selected = torch.ops.flash_dmattn.select_keys(score, visible, 256, is_causal)
        expected = torch.ops.flash_dmattn.select_keys(score.cpu(), visible.cpu(), 256, is_causal)
        assert torch.equal(selected.cpu(), expected)


def training_step(query, key, value, bias, grad_out):
    out = flash_dmattn_func(query, key, value, attn_bias=bias, is_causal=True, keep_window_size=256, deterministic=True)
    return out.detach(), *torch.autograd.grad(out, (query, key, value, bias), grad_out)


def training_inputs(seed, length=3000):
    sizes = (1, length, 4, 64), (1, length, 2, 64), (1, length, 2, 64), (1, 2, 1, length), (1, length, 4, 64)
    *inputs, grad_out = (random(seed + i, *size) for i, size in enumerate(sizes))
    return *leaves(*inputs), grad_out


def assert_equal(results, expected):
    assert all(torch.equal(x, y) for x, y in zip(results, expected, strict=True))


def test_same_bits_of_long_sums():
    inputs = training_inputs(0, length=16384)
    first = training_step(*inputs)
    for _ in range(10):
        poison(256)
        assert_equal(training_step(*inputs), first)


def test_graph():
    """Captured once, replayed with other inputs: mask, forward and backward."""
    inputs = training_inputs(0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            training_step(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = training_step(*inputs)
    for seed in (0, 100, 200):
        new = training_inputs(seed)
        with torch.no_grad():
            for x, y in zip(inputs, new, strict=True):
                x.copy_(y)
        graph.replay()
        assert_equal(results, training_step(*new))


def test_graph_of_decoding():
    query = random(0, 1, 1, 16, 128)
    key, value = (random(seed, 1, 20000, 8, 128) for seed in (1, 2))
    mask = DynamicMask.from_score(random(3, 1, 8, 20000), 1024, query_len=1)
    flash_dmattn_func(query, key, value, mask)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = flash_dmattn_func(query, key, value, mask)
    query.copy_(random(4, 1, 1, 16, 128))
    graph.replay()
    assert torch.equal(out, flash_dmattn_func(query, key, value, mask))


def test_the_current_stream():
    """What was launched on it before is seen, what is launched on it afterwards waits."""
    inputs, new = training_inputs(0), training_inputs(100)
    expected = training_step(*new)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.no_grad():
        torch.cuda._sleep(100_000_000)
        for x, y in zip(inputs, new, strict=True):
            x.copy_(y)
        with torch.enable_grad():
            results = training_step(*inputs)
        for x in inputs:
            x.zero_()
    stream.synchronize()
    assert_equal(results, expected)


def test_threads():
    """At once, each on a stream of its own."""
    inputs = training_inputs(0)
    expected, results = training_step(*inputs), {}
    torch.cuda.synchronize()

    def work(index):
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(5):
                results[index] = training_step(*inputs)
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == len(threads)
    for result in results.values():
        assert_equal(result, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
def test_the_tensors_device_and_not_the_current_one():
    inputs = training_inputs(0)
    expected = training_step(*inputs)
    others = [x.detach().to("cuda:1").requires_grad_(x.requires_grad) for x in inputs]
    for _ in range(3):
        results = training_step(*others)
        assert all(x.device == torch.device("cuda", 1) for x in results)
        assert_equal([x.cuda(0) for x in results], expected)
        assert_equal(training_step(*inputs), expected)
    assert torch.cuda.current_device() == 0
    with pytest.raises(ValueError, match="key is on cuda:1; it takes a tensor on cuda:0, as query"):
        flash_dmattn_func(inputs[0], others[1], others[2])


def test_tensors_of_two_devices_are_refused():
    query, key, value = (random(seed, 1, 8, 2, 16) for seed in range(3))
    rest = *[None] * 4, 1.0, 0.0, False, False
    operator = torch.ops.flash_dmattn.forward
    with pytest.raises((ValueError, RuntimeError), match="key is on cpu; it takes a tensor on cuda:0, as query"):
        operator(query, key.cpu(), value, *rest)
    with pytest.raises((ValueError, RuntimeError), match="query is on cpu, other tensors on a GPU"):
        operator(query.cpu(), key, value, *rest)
    bias = torch.zeros(1, 1, 1, 8, device="cpu")
    with pytest.raises((ValueError, RuntimeError), match="bias is on cpu; it takes a tensor on cuda:0, as query"):
        operator(query, key, value, None, bias, *rest[2:])
    with pytest.raises(ValueError, match="value is on cpu; it takes a tensor on cuda:0, as query"):
        flash_dmattn_func(query, key, value.cpu())


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_dtypes_that_have_no_kernels(dtype):
    inputs = [random(seed, 1, 8, 2, 16, dtype=dtype) for seed in range(3)]
    name = str(dtype).removeprefix("torch.")
    takes = f"query is {name}; it takes float16 or bfloat16 on CUDA; flex_dmattn_func also takes float32"
    with pytest.raises(TypeError, match=takes):
        flash_dmattn_func(*inputs)
    with pytest.raises((ValueError, RuntimeError), match=f"query.*{name}"):
        torch.ops.flash_dmattn.forward(*inputs, *[None] * 4, 1.0, 0.0, False, False)


def test_auto_takes_each_dtype_to_a_backend_that_takes_it():
    wide = random(0, 1, 8, 2, 16, dtype=torch.float32)
    assert _best_backend(random(0, 1, 8, 2, 16), has_bias=False) == "cuda"
    assert _best_backend(wide, has_bias=False) == ("triton" if TRITON_AVAILABLE else "flex")
    with torch.autocast("cuda"):
        assert _best_backend(wide, has_bias=False) == "cuda"
    inputs = [random(seed, 1, 8, 2, 16) for seed in range(3)]
    assert torch.equal(flash_dmattn_func_auto()(*inputs, is_causal=True), flash_dmattn_func(*inputs, is_causal=True))


@pytest.mark.parametrize("offset, position, head", ((0, 3, 0), (1, 0, 0), (3, 5, 1), (8, 16, 8), (0, 0, 4), (5, 8, 2)))
@pytest.mark.parametrize("head_dim", (7, 32, 128))
def test_odd_strides_and_offsets(head_dim, offset, position, head):
    """Elements by which memory starts late, and by which positions and heads lie further apart."""

    def odd(x):
        batch, length, heads, head_dim = x.shape
        strides = (
            length * (heads * (head_dim + head) + position),
            heads * (head_dim + head) + position,
            head_dim + head,
            1,
        )
        memory = torch.full((offset + batch * strides[0],), math.nan, dtype=x.dtype)
        view = memory.as_strided(x.shape, strides, offset)
        view.copy_(x)
        return view

    length = 200
    query, grad_out = (random(seed, 2, length, 4, head_dim) for seed in (0, 1))
    key, value = (random(seed, 2, length, 2, head_dim) for seed in (2, 3))
    bias, mask = random(4, 2, 1, length, length), torch.rand(2, 1, length, length, generator=generator(5)) < 0.6
    odd_mask = torch.zeros(2, length, 1, 2 * length + 1, dtype=torch.bool)[:, :, :, 1::2]
    odd_mask.copy_(mask.permute(0, 3, 1, 2))
    results = []
    for tensors, extra in (
        ((query, key, value, grad_out), (mask, bias)),
        ([odd(x) for x in (query, key, value, grad_out)], (odd_mask.permute(0, 2, 3, 1), odd(bias))),
    ):
        *inputs, grad = tensors
        inputs, bias_leaf = leaves(*inputs), extra[1].detach().requires_grad_()
        out = flash_dmattn_func(*inputs, extra[0], bias_leaf, is_causal=True, deterministic=True)
        results.append((out.detach(), *torch.autograd.grad(out, (*inputs, bias_leaf), grad)))
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y)


def test_memory_of_a_training_step():
    """N 32768, 16 heads on 8 KV heads: 0.65 GB over inputs, outputs and gradients, float32 accumulators included."""
    length = 32768
    *inputs, grad_out = (
        random(seed, 1, length, heads, 128) for seed, heads in enumerate((16, 8, 8, 16))
    )  # fmt: skip
    inputs = leaves(*inputs)
    bias = random(9, 1, 8, 1, length, dtype=torch.float32).requires_grad_()

    def step():
        out = flash_dmattn_func(*inputs, attn_bias=bias, is_causal=True, keep_window_size=1024)
        return out, *torch.autograd.grad(out, (*inputs, bias), grad_out)

    step()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = step()
    extra = torch.cuda.max_memory_allocated() - before - sum(x.nbytes for x in results)
    assert extra <= 0.65e9, f"{extra / 1e9:.2f} GB"


# More than 2^31 elements.


@pytest.mark.large
@pytest.mark.parametrize("kind", ("dynamic", "full_bias"))
def test_large_strides(kind):
    """Views into one tensor of more than 2^31 elements give what copies give."""
    length, stride = 16384, 140_000
    memory = torch.full((length * stride // 2,), 0x7FFF7FFF, dtype=torch.int32).view(torch.bfloat16)
    assert memory.numel() > 2**31

    def spread(x, offset):
        view = memory.as_strided(x.shape, (length * stride, stride, x.size(3), 1), offset)
        view.copy_(x)
        return view

    copies = [random(seed, 1, length, heads, 64) for seed, heads in enumerate((2, 1, 1, 2))]
    views = [spread(x, 1000 * i + 8) for i, x in enumerate(copies)]
    bias = random(9, 1, 1, 1, length) if kind == "dynamic" else random(9, 1, 1, length, length)
    results = []
    for *inputs, grad_out in (copies, views):
        inputs = leaves(*inputs)
        options = {"keep_window_size": 512} if kind == "dynamic" else {}
        out = flash_dmattn_func(*inputs, attn_bias=bias, is_causal=True, deterministic=True, **options)
        results.append((out.detach(), *torch.autograd.grad(out, inputs, grad_out)))
    assert_equal(*results)


@pytest.mark.large
def test_large_bias_and_probabilities():
    """More than 2^31 pairs: bias, its gradient, and probabilities."""
    length, head_dim = 49152, 64
    query, key, value, grad_out = (random(seed, 1, length, 1, head_dim) for seed in range(4))
    bias = torch.empty(1, 1, length, length, dtype=torch.bfloat16).normal_(generator=generator(4)).requires_grad_()
    assert bias.numel() > 2**31
    out, lse, probs = flash_dmattn_func(query, key, value, attn_bias=bias, is_causal=True, return_attn_probs=True)
    (grad,) = torch.autograd.grad(out, bias, grad_out)
    rows = torch.tensor([0, 1, 127, 20000, 43690, 43691, length - 129, length - 1])
    head = OneHead(
        query[0], key[0, :, 0], value[0, :, 0], grad_out[0], causal(length, length), bias.detach()[0, 0]
    )  # fmt: skip
    actual = {"out": out[0, rows].detach(), "lse": lse[0][:, rows].detach(), "bias": grad[0, 0, rows]}
    check_head(actual, head, rows=rows)
    torch.testing.assert_close(probs[0, 0, rows].float().sum(-1), torch.ones(len(rows)), rtol=1e-2, atol=0)
    assert not probs[0, 0, rows].masked_select(~causal(length, length)(rows)).any()


@pytest.mark.large
def test_large_mask():
    """A boolean mask of more than 2^31 pairs."""
    length = 49152
    query, key, value, grad_out = (random(seed, 1, length, 1, 64) for seed in range(4))
    mask = torch.empty(1, 1, length, length, dtype=torch.uint8).random_(0, 20, generator=generator(4)) == 0
    inputs = leaves(query, key, value)
    out, lse = attention_with_lse(*inputs, attn_mask=mask)
    grads = torch.autograd.grad(out, inputs, grad_out)
    head = OneHead(
        query[0], key[0, :, 0], value[0, :, 0], grad_out[0], lambda rows: mask[0, 0, rows]
    )  # fmt: skip
    actual = {"out": out[0].detach(), "lse": lse[0].detach(), "query": grads[0][0]}
    check_head(actual | {"key": grads[1][0, :, 0], "value": grads[2][0, :, 0]}, head)


@pytest.mark.large
def test_large_lse():
    """More than 2^31 rows."""
    query_len, heads, key_len = 2**25 + 100, 64, 64
    query = torch.empty(1, query_len, heads, 8, dtype=torch.bfloat16).normal_(generator=generator(0))
    key, value = (random(seed, 1, key_len, heads // 8, 8) for seed in (1, 2))
    out, lse = attention_with_lse(query, key, value)
    assert lse.numel() > 2**31
    for rows in (slice(0, 100), slice(query_len // 2, query_len // 2 + 100), slice(query_len - 100, query_len)):
        head = OneHead(
            query[0, rows, -8:], key[0, :, -1], value[0, :, -1], query[0, rows, -8:],
            lambda rows: torch.ones(len(rows), key_len, dtype=torch.bool),
        )  # fmt: skip
        check_head({"out": out[0, rows, -8:], "lse": lse[0, -8:, rows]}, head)


@pytest.mark.large
def test_large_plan():
    """Key lists of more than 2^31 entries."""
    length, heads, w = 2**20, 8, 32768
    query, key, value = (random(seed, 1, length, heads, 64) for seed in range(3))
    score = random(3, 1, heads, length, dtype=torch.float32)
    mask = DynamicMask.from_score(score, w)
    out, lse = attention_with_lse(query, key, value, attn_mask=mask)
    rows = torch.tensor([0, 40000, 524287, length - 1])
    head = OneHead(
        query[0, :, -1:], key[0, :, -1], value[0, :, -1], query[0, :, -1:], dynamic(mask),
    )  # fmt: skip
    check_head({"out": out[0, rows, -1:].detach(), "lse": lse[0, -1:, rows].detach()}, head, rows=rows)


@pytest.mark.large
def test_a_million_tokens():
    """Forward and backward at N 1,048,576, w 2048, 8 KV heads."""
    length, heads, w = 2**20, 8, 2048
    inputs = leaves(*(random(seed, 1, length, heads, 128) for seed in range(3)))
    bias = random(3, 1, heads, 1, length, dtype=torch.float32).requires_grad_()
    grad_out = random(4, 1, length, heads, 128)
    out = flash_dmattn_func(*inputs, attn_bias=bias, is_causal=True, keep_window_size=w)
    grads = torch.autograd.grad(out, (*inputs, bias), grad_out)
    assert all(grad.isfinite().all() for grad in grads)
    visible = dynamic(DynamicMask.from_score(bias.detach()[:, -1:, 0], w))
    rows = torch.tensor([0, w, 524287, length - 1])
    query, key, value = (x.detach()[0, :, -1] for x in inputs)
    head = OneHead(query[:, None], key, value, grad_out[0, :, -1:], visible, bias.detach()[0, -1, 0])
    check_head({"out": out[0, rows, -1:].detach(), "query": grads[0][0, rows, -1:]}, head, rows=rows)
