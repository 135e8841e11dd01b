"""FlexAttention's lists of blocks and keys, the gradients around its kernels, and how often it compiles. That it
computes attention is test_backends.py's."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import reference
from devices import generator, on_gpu
from flash_dmattn import DynamicMask, backends, flash_dmattn_func, flex_dmattn_func, operators
from flash_dmattn.backends import flex
from flash_dmattn.backends.tiles import BLOCK, make_blocks, make_tiles
from flash_dmattn.problem import make_problem

if backends.load("flex").MISSING is not None:
    pytest.skip("FlexAttention cannot run here", allow_module_level=True)
H, HK, D = 4, 2, 16


def with_survivors(mask):
    """What a GPU makes beside `end`, from the definition: for each chunk the keys that are there at its start."""
    if mask.survivors.numel():
        return mask
    key_len, slots = mask.shape[3], min(mask.keep_window_size, mask.shape[3])
    start = torch.arange(0, key_len, operators.survivor_chunk(mask.keep_window_size))[:, None]
    survives = (torch.arange(key_len) < start) & (mask.end[:, :, None] > start)
    order = survives.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., :slots]
    mask.survivors = torch.where(survives.gather(-1, order), order, -1).int()
    return mask


def problem_of(query_len, key_len, mask=None, bias=None, *, batch=1, kv_heads=HK, dtype=torch.float32, **options):
    torch.manual_seed(1)
    sizes = (query_len, H), (key_len, kv_heads), (key_len, kv_heads)
    query, key, value = (torch.randn(batch, *size, D, dtype=dtype).requires_grad_() for size in sizes)
    names = ("scale", "is_causal", "softcap", "deterministic", "keep_window_size")
    return make_problem(query, key, value, mask, bias, *(options.get(name) for name in names))


def visible_in(tiles):
    """(T, H, Q, K) bool, from the two numbers per key and the mask."""
    row = torch.arange(tiles.query.size(2))[:, None]
    visible = (tiles.start[:, :, None] <= row) & (row < tiles.end[:, :, None])
    return visible if tiles.mask is None else visible & reference.expand_heads(tiles.mask, H)


def listed(count, blocks):
    """(T, H, rows, columns) bool: the blocks of a list. A list has each block once."""
    is_listed = torch.zeros(blocks.shape, dtype=torch.int32)
    used = torch.arange(blocks.size(3)) < count[..., None]
    is_listed.scatter_add_(3, blocks.long(), used.int())
    assert is_listed.max() <= 1
    return is_listed.bool()


def make_mask(kind, query_len, key_len):
    torch.manual_seed(0)
    if kind in ("dynamic", "gathered", "everywhere"):
        score = torch.randn(1, HK, key_len)
        mask = DynamicMask.from_score(score, 40, query_len=query_len, is_causal=kind != "everywhere")
        return with_survivors(mask) if kind == "gathered" else mask
    if kind == "dense":  # with blocks of its own
        blocks = torch.rand(1, H, -(-query_len // 64), -(-key_len // 64)) < 0.3
        return blocks.repeat_interleave(64, 2).repeat_interleave(64, 3)[:, :, :query_len, :key_len]
    sizes = {"per_key": (1, 1, 1, key_len), "per_query": (1, HK, query_len, 1)}
    return torch.rand(sizes[kind]) > 0.5 if kind in sizes else None


KINDS = ("none", "per_key", "per_query", "dense", "dynamic", "everywhere", "gathered")


@pytest.mark.parametrize("is_causal", (False, True))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("query_len, key_len", ((2200, 2200), (300, 2500), (900, 300)))
def test_blocks(query_len, key_len, kind, is_causal):
    """Every visible pair is in a block that is listed, and those that are listed as full are."""
    problem = problem_of(query_len, key_len, make_mask(kind, query_len, key_len), is_causal=is_causal)
    tiles, cut = make_tiles(problem)
    visible = visible_in(tiles)
    visible[:, :, cut.first + query_len :] = False  # no queries
    by_block = visible.unflatten(3, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
    some = by_block.any(5).any(3)
    lists = make_blocks(tiles, cut, backward=True)
    assert all(x.is_contiguous() for x in lists)  # as FlexAttention's kernels read them
    partial, full, partial_of_keys, full_of_keys = (listed(*lists[i : i + 2]) for i in range(0, 8, 2))
    assert not (partial & full).any()
    assert not (some & ~(partial | full)).any()
    is_query = (torch.arange(tiles.query.size(2)) < cut.first + query_len).unflatten(0, (-1, BLOCK))
    hidden = is_query[:, :, None, None] & ~by_block
    assert not (full & hidden.any(5).any(3)).any()
    assert torch.equal(partial, partial_of_keys.mT) and torch.equal(full, full_of_keys.mT)
    if kind != "dense":  # where lists of two masks meet, few are listed for nothing
        assert (partial | full).sum() <= 1.25 * some.sum() + tiles.query.size(0) * H * 4


@pytest.mark.parametrize("batch, query_len, key_len, w, heads", (
    (1, 2500, 2500, 40, HK), (3, 700, 4500, 600, H), (2, 1, 2300, 300, 1), (1, 2049, 2049, 512, 1),
))  # fmt: skip
def test_gathered_keys(batch, query_len, key_len, w, heads):
    """Each tile has just the keys that its queries see, once; a per-key mask hides some."""
    score = torch.randn(batch, heads, key_len).round()
    mask = with_survivors(DynamicMask.from_score(score, w, query_len=query_len))
    problem = problem_of(query_len, key_len, mask, batch=batch)
    hidden = torch.rand(batch, 1, 1, key_len) < 0.2
    problem = problem._replace(mask=~hidden)
    with torch.no_grad():
        problem.key[..., 0] = torch.arange(key_len)[:, None]
    tiles, cut = make_tiles(problem)
    assert tiles.key.size(2) <= 4 * max(w, 512) < key_len
    position = tiles.key[..., 0].detach().round().long()  # (T, heads, keys)
    position = reference.expand_heads(position, H)[:, :, None].expand(-1, -1, tiles.query.size(2), -1)
    seen = torch.zeros(*position.shape[:3], key_len).scatter_add_(3, position, visible_in(tiles).float())
    seen = seen.transpose(1, 2).unflatten(0, (-1, cut.tiles))[:batch].flatten(1, 2)
    seen = seen[:, cut.first : cut.first + query_len].transpose(1, 2)
    assert torch.equal(seen, (reference.expand_heads(mask.to_dense(), H) & ~hidden).float())


class Operations(TorchDispatchMode):
    """The largest tensor that an operation makes, and their names."""

    def __init__(self):
        super().__init__()
        self.names, self.largest = [], 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        self.names.append(function.overloadpacket.__name__)
        results = result if isinstance(result, (tuple, list)) else (result,)
        self.largest = max([self.largest, *(x.numel() for x in results if isinstance(x, torch.Tensor))])
        return result


@pytest.mark.parametrize("kind", ("none", "per_key", "dynamic", "gathered"))
def test_no_pairs_are_looked_at(kind):
    length = 8192
    problem = problem_of(length, length, make_mask(kind, length, length), is_causal=True)
    with torch.no_grad(), Operations() as operations:
        tiles, cut = make_tiles(problem)
        make_blocks(tiles, cut, backward=True)
    assert operations.largest <= H * length * max(D, 3) < length * length / 64
    # Nothing waits for a device, and there are few kernels to launch.
    assert not {"_local_scalar_dense", "nonzero", "item", "is_nonzero"} & set(operations.names)
    views = ("view", "slice", "unsqueeze", "squeeze", "expand", "transpose", "detach", "_unsafe_view", "alias")
    assert sum(name not in views for name in operations.names) < 90


def definition(tiles, blocks, scale, softcap):
    """In place of the kernels: attention over the listed blocks, from the definition, differentiable."""
    partial, full = listed(*blocks[:2]), listed(*blocks[2:4])
    partial, full = (x.repeat_interleave(BLOCK, 2).repeat_interleave(BLOCK, 3) for x in (partial, full))
    query, key, value = (x.transpose(1, 2) for x in tiles[:3])
    visible = full | (partial & visible_in(tiles))
    out, lse, _ = reference.attention(query, key, value, tiles.bias, visible, scale, softcap or None)
    return out.transpose(1, 2), lse


BIASES = {"none": None, "per_key": (1, HK, 1), "full": (1, H, 0), "single": (1, 1, 1, 1)}


@pytest.mark.parametrize("deterministic", (False, True))
@pytest.mark.parametrize("bias_kind", BIASES)
@pytest.mark.parametrize("kind", ("gathered", "dense", "dynamic"))
def test_gradients(kind, bias_kind, deterministic, monkeypatch):
    """All that is around FlexAttention's kernels, which have no backward on the CPU, in float64."""
    monkeypatch.setattr(flex, "_run", definition)
    monkeypatch.setattr(flex.plain, "PAIRS", 2**20)
    query_len, key_len = 300, 2100
    mask = make_mask(kind, query_len, key_len)
    bias = None
    if bias_kind != "none":
        size = *BIASES[bias_kind], key_len
        bias = torch.randn([n or query_len for n in size[:4]], dtype=torch.float64).requires_grad_()
    problem = problem_of(query_len, key_len, mask, bias, dtype=torch.float64, softcap=3.0, deterministic=deterministic)
    assert (make_tiles(problem)[0].key.size(2) < key_len) == (kind == "gathered" and bias_kind != "full")
    out, lse = flex._flex_attention(problem)
    visible = mask if kind == "dense" else mask.to_dense()
    expected = reference.attention(*problem[:3], bias, visible, problem.scale, problem.softcap)
    leaves = [x for x in (*problem[:3], bias) if x is not None]
    grads = torch.randn_like(out), torch.randn_like(lse)
    # The deterministic gradient of a bias is float32.
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if deterministic else {}
    torch.testing.assert_close((out, lse), expected[:2])
    torch.testing.assert_close(
        torch.autograd.grad((out, lse), leaves, grads), torch.autograd.grad(expected[:2], leaves, grads), **tolerance
    )


@pytest.mark.parametrize("kind", ("none", "dense", "gathered"))
def test_probabilities(kind):
    """Those of GPUs; on the CPU they are the engine's."""
    query_len, key_len = 130, 2100
    mask, bias = make_mask(kind, query_len, key_len), torch.randn(1, HK, 1, key_len)
    problem = problem_of(query_len, key_len, mask, bias, is_causal=True, softcap=3.0).detach()
    visible = reference.causal_mask(query_len, key_len)[None, None]
    if mask is not None:
        visible = visible & (mask if kind == "dense" else mask.to_dense())
    _, lse, probs = reference.attention(*problem[:3], bias, visible, problem.scale, problem.softcap)
    torch.testing.assert_close(flex._probabilities(problem, lse), probs)


def test_gathered_keys_give_the_same(device):
    """By FlexAttention itself: with lists of keys and without."""
    query_len, key_len = 600, 2100
    dtype, tolerance = (torch.bfloat16, 2e-2) if on_gpu() else (torch.float32, 1e-5)
    random = generator(0)
    query = torch.randn(2, query_len, H, D, generator=random).to(dtype)
    key, value = torch.randn(2, 2, key_len, HK, D, generator=random).to(dtype)
    score = torch.randn(1, HK, key_len, generator=random)
    mask = with_survivors(DynamicMask.from_score(score.expand(2, -1, -1), 40, query_len=query_len))
    bias = score[:, :, None]
    out = flex_dmattn_func(query, key, value, mask, bias)
    torch.testing.assert_close(out, flash_dmattn_func(query, key, value, mask, bias), rtol=tolerance, atol=tolerance)
    mask.survivors = mask.survivors[..., :0]
    whole = flex_dmattn_func(query, key, value, mask, bias)
    torch.testing.assert_close(out, whole, rtol=tolerance, atol=tolerance)


def test_few_compilations(device):
    """One for each rounded size; none for other lengths, numbers, or kinds of per-key masks and biases."""
    from torch._dynamo.utils import counters

    def compiled(query_len, key_len, batch=1, **options):
        before = counters["stats"]["unique_graphs"]
        query = torch.randn(batch, query_len, 2, 24).half()
        key, value = torch.randn(2, batch, key_len, 1, 24).half()
        with torch.no_grad():
            flex_dmattn_func(query, key, value, **options)
        return counters["stats"]["unique_graphs"] - before

    compiled(3, 300)  # of all calls the first tries the backend
    assert compiled(100, 100) == 1
    lengths = itertools.product((1, 7, 64, 127, 128), (3, 99, 128))
    assert sum(compiled(query_len, key_len) for query_len, key_len in lengths) == 0
    assert compiled(77, 77, scale=0.3, is_causal=True) == 0
    assert compiled(50, 60, attn_mask=torch.rand(1, 2, 1, 60) > 0.5) == 0
    for w in (5, 9):
        assert compiled(60, 60, attn_mask=DynamicMask.from_score(torch.randn(1, 1, 60), w)) == 0
    assert compiled(129, 200) == 1
    assert sum(compiled(length, length) for length in range(130, 257, 9)) == 0


def test_one_tensor_as_query_key_and_value():
    inputs = [torch.randn(2, 40, 2, D)] * 3
    torch.testing.assert_close(flex_dmattn_func(*inputs), flash_dmattn_func(*inputs))


def test_lse_is_not_computed_twice(monkeypatch):
    """On the CPU: with the output if it or a gradient is asked for, and then kept for the backward pass."""
    calls = []
    forward = operators.forward
    monkeypatch.setattr(operators, "forward", lambda *arguments: calls.append(1) or forward(*arguments))
    inputs = [torch.randn(2, 40, 2, D) for _ in range(3)]
    out = flex_dmattn_func(*inputs)
    assert not calls
    leaves = [x.requires_grad_() for x in inputs]
    out, lse, _ = flex_dmattn_func(*leaves, return_attn_probs=True)
    torch.autograd.grad((out.sum(), lse.sum()), leaves)
    assert len(calls) == 1 and lse.isfinite().all()
