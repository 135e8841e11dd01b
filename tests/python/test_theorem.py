"""The theorem behind the dynamic mask (docs/design.md), statement by statement, on the masks that the library makes."""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

import reference
from devices import generator, on_gpu, usual_dtype
from flash_dmattn import DynamicMask, flash_dmattn_func

pytestmark = pytest.mark.usefixtures("device")

# Few levels: ties are the normal case.
SCORES = st.builds(
    lambda seed, length, levels: torch.randint(levels, (length,), generator=generator(seed)).float(),
    seed=st.integers(0, 2**32 - 1),
    length=st.integers(1, 200),
    levels=st.sampled_from((1, 2, 5, 30, 10**6)),
)
WINDOWS = st.one_of(st.integers(1, 20), st.integers(1, 220))


def ranks(score):
    """(K,) -> (K,): every key's place in the order of keys, 0 for the one that beats nobody."""
    return reference.beats(score).sum(-1)


def top(score, keys, keep_window_size):
    """The positions among `keys` of the best keep_window_size, in rising order."""
    order = ranks(score)[keys].argsort(descending=True)[:keep_window_size]
    return keys[order].sort().values


def dense_mask(score, keep_window_size, **options):
    return DynamicMask.from_score(score[None, None], keep_window_size, **options).to_dense()[0, 0]


@hypothesis.given(score=SCORES, keep_window_size=WINDOWS)
def test_1_a_key_is_visible_to_one_interval(score, keep_window_size):
    mask = DynamicMask.from_score(score[None, None], keep_window_size)
    position = torch.arange(len(score))
    interval = (position <= position[:, None]) & (position[:, None] < mask.end[0, 0])
    assert torch.equal(interval, reference.dynamic_mask(score[None, None], keep_window_size, len(score))[0, 0])


@hypothesis.given(score=SCORES, keep_window_size=WINDOWS)
def test_2_the_threshold_is_the_whole_mask(score, keep_window_size):
    rank, length = ranks(score), len(score)
    threshold = torch.full((length,), -1)  # below everything
    for p in range(keep_window_size - 1, length):
        threshold[p] = rank[: p + 1].sort(descending=True).values[keep_window_size - 1]
    assert (threshold.diff() >= 0).all()
    at_least_threshold = rank >= threshold[:, None]
    assert torch.equal(dense_mask(score, keep_window_size), at_least_threshold & reference.causal_mask(length, length))
    # The first position at or after k whose threshold passes k, or the end of the sequence.
    end = torch.maximum(torch.searchsorted(threshold, rank, right=True), torch.arange(length))
    assert torch.equal(DynamicMask.from_score(score[None, None], keep_window_size).end[0, 0].long(), end)


@hypothesis.given(score=SCORES, keep_window_size=WINDOWS, tile=st.sampled_from((1, 7, 32, 64, 128)))
def test_3_a_tile_sees_few_keys_the_survivors_and_its_own(score, keep_window_size, tile):
    dense, length = dense_mask(score, keep_window_size), len(score)
    for start in range(0, length, tile):
        seen = dense[start : start + tile].any(0)
        rows = len(dense[start : start + tile])
        assert seen.sum() <= keep_window_size - 1 + rows
        survivors = top(score, torch.arange(start), keep_window_size)
        allowed = torch.zeros(length, dtype=torch.bool)
        allowed[survivors] = True
        allowed[start : start + rows] = True
        assert not (seen & ~allowed).any()
        if start:
            assert torch.equal(dense[start - 1].nonzero().squeeze(-1), survivors)


@hypothesis.given(score=SCORES, keep_window_size=WINDOWS, cuts=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_4_the_best_keys_merge_associatively(score, keep_window_size, cuts):
    keys = torch.arange(len(score))
    first, second = sorted(round(cut * len(score)) for cut in cuts)
    a, b, c = (top(score, part, keep_window_size) for part in keys.tensor_split((first, second)))

    def merge(x, y):
        return top(score, torch.cat([x, y]), keep_window_size)

    assert torch.equal(merge(merge(a, b), c), merge(a, merge(b, c)))
    assert torch.equal(merge(merge(a, b), c), top(score, keys, keep_window_size))
    assert torch.equal(merge(merge(a, b), c), dense_mask(score, keep_window_size)[-1].nonzero().squeeze(-1))


def random_attention(seed, length, head_dim=5, kv_heads=2, group=2):
    dtype, random = usual_dtype() if on_gpu() else torch.float64, generator(seed)
    query = torch.randn(1, length, kv_heads * group, head_dim, generator=random).to(dtype)
    key, value = torch.randn(2, 1, length, kv_heads, head_dim, generator=random).to(dtype)
    score = torch.randint(6, (1, kv_heads, length), generator=random).to(dtype) / 4
    return query, key, value, score


def assert_close(x, y):
    # The same keys in another order: on a GPU sums of float32, of probabilities in bfloat16.
    tolerance = 2e-2 if on_gpu() else 1e-12
    torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


def gather_rows(x, positions):
    """x (1, N, heads, D), positions (heads, n) -> (1, n, heads, D)."""
    return x.gather(1, positions.T[None, :, :, None].expand(-1, -1, -1, x.shape[-1]))


@hypothesis.settings(max_examples=hypothesis.settings().max_examples // 2)
@hypothesis.given(seed=st.integers(0, 2**32 - 1), length=st.integers(1, 60), keep_window_size=st.integers(1, 24))
def test_5_a_cache_of_w_rows_is_exact(seed, length, keep_window_size):
    query, key, value, score = random_attention(seed, length)
    mask = DynamicMask.from_score(score, keep_window_size)
    whole = flash_dmattn_func(query, key, value, mask, score[:, :, None])
    cache = torch.empty(score.shape[1], 0, dtype=torch.long)  # the positions of the rows that are kept
    for p in range(length):
        candidates = torch.cat([cache, torch.full((len(cache), 1), p)], dim=1)
        cache = torch.stack([top(s, keys, keep_window_size) for s, keys in zip(score[0], candidates, strict=True)])
        bias = score.gather(-1, cache[None])[:, :, None]
        row = flash_dmattn_func(query[:, p : p + 1], gather_rows(key, cache), gather_rows(value, cache), None, bias)
        assert_close(row, whole[:, p : p + 1])


@hypothesis.settings(max_examples=hypothesis.settings().max_examples // 2)
@hypothesis.given(
    seed=st.integers(0, 2**32 - 1),
    lengths=st.lists(st.integers(1, 150), min_size=2, max_size=3),
    keep_window_size=WINDOWS,
)
def test_6_context_parallelism_exchanges_w_rows(seed, lengths, keep_window_size):
    query, key, value, score = random_attention(seed, sum(lengths))
    whole = flash_dmattn_func(query, key, value, DynamicMask.from_score(score, keep_window_size), score[:, :, None])
    survivors = torch.empty(score.shape[1], 0, dtype=torch.long)
    start = 0
    for length in lengths:
        own = torch.arange(start, start + length).expand(len(survivors), -1)
        keys = torch.cat([survivors, own], dim=1)
        local_score = score.gather(-1, keys[None])
        out = flash_dmattn_func(
            query[:, start : start + length],
            gather_rows(key, keys),
            gather_rows(value, keys),
            DynamicMask.from_score(local_score, keep_window_size, query_len=length),
            local_score[:, :, None],
        )
        assert_close(out, whole[:, start : start + length])
        survivors = torch.stack([top(s, k, keep_window_size) for s, k in zip(score[0], keys, strict=True)])
        assert survivors.shape[1] <= keep_window_size
        start += length
