"""DynamicMask against its definition."""

import math

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

import reference
from devices import generator as make_generator
from flash_dmattn import DynamicMask

pytestmark = pytest.mark.usefixtures("device")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
VALUES = st.sampled_from((0.0, -0.0, 1.0, -1.0, 0.5, -2.0, 3.0, math.inf, -math.inf, math.nan))


def random_score(generator, *size, levels=None, dtype=torch.float32):
    """Normal scores, or as many different ones as `levels`."""
    if levels is None:
        return torch.randn(size, generator=generator).to(dtype)
    return torch.randint(levels, size, generator=generator).to(dtype)


def expected_end(score, keep_window_size, is_causal=True, query_len=None, key_padding_mask=None):
    key_len = score.shape[-1]
    if is_causal:
        return reference.causal_end(
            reference.dynamic_mask(score, keep_window_size, key_len, key_padding_mask=key_padding_mask)
        )
    seen = reference.dynamic_mask(score, keep_window_size, 1, False, key_padding_mask).squeeze(-2)
    return torch.where(seen, key_len, min(0, key_len - query_len))


def check(score, keep_window_size, **options):
    mask = DynamicMask.from_score(score, keep_window_size, **options)
    query_len = options.pop("query_len", None) or score.shape[-1]
    dense = reference.dynamic_mask(score, keep_window_size, query_len, **options)
    assert mask.to_dense().dtype == torch.bool
    assert torch.equal(mask.to_dense(), dense)
    assert mask.end.dtype == torch.int32
    assert torch.equal(mask.end.long(), expected_end(score, keep_window_size, query_len=query_len, **options))
    return mask


def test_selections_of_the_reference_agree():
    generator = make_generator(0)
    for window in (1, 3, 8, 40):
        score = random_score(generator, 2, 3, 33, levels=4)
        visible = torch.rand(2, 3, 20, 33, generator=generator) < 0.6
        by_definition = reference.select(score, visible, window)
        assert torch.equal(
            by_definition, reference.select_rows(score[:, :, None].expand(2, 3, 20, 33), visible, window)
        )
        assert torch.equal(by_definition.sum(-1), visible.sum(-1).clamp(max=window))


@hypothesis.given(
    data=st.data(),
    dtype=st.sampled_from(DTYPES),
    batch=st.integers(1, 2),
    heads=st.integers(1, 3),
    key_len=st.integers(1, 40),
    is_causal=st.booleans(),
    padded=st.booleans(),
)
def test_follows_its_definition(data, dtype, batch, heads, key_len, is_causal, padded):
    query_len = data.draw(st.integers(1, 40))
    keep_window_size = data.draw(st.integers(1, key_len + 2))
    values = data.draw(st.lists(VALUES, min_size=key_len, max_size=key_len))
    shifts = [torch.tensor(values, dtype=dtype).roll(3 * i) for i in range(batch * heads)]
    score = torch.stack(shifts).view(batch, heads, key_len)
    options = {"is_causal": is_causal, "query_len": query_len}
    if padded:
        rows = data.draw(st.sampled_from((1, batch)))
        seen = data.draw(st.lists(st.booleans(), min_size=rows * key_len, max_size=rows * key_len))
        options["key_padding_mask"] = torch.tensor(seen).view(rows, key_len)
    check(score, keep_window_size, **options)


@pytest.mark.parametrize("levels, dtype", ((None, torch.bfloat16), (1, torch.float32), (100, torch.float16)))
@pytest.mark.parametrize("query_len, key_len", ((257, 257), (600, 600), (1, 1300), (65, 600), (600, 65), (1300, 1300)))
def test_long_sequences(query_len, key_len, levels, dtype):
    generator = make_generator(query_len + key_len)
    score = random_score(generator, 1, 2, key_len, levels=levels, dtype=dtype)
    padding = torch.rand(1, key_len, generator=generator) < 0.8
    for keep_window_size in (1, 63, 256, key_len):
        check(score, keep_window_size, query_len=query_len)
    check(score, 64, query_len=query_len, key_padding_mask=padding)
    check(score, 64, query_len=query_len, is_causal=False, key_padding_mask=padding)


@pytest.mark.parametrize("order", ("rising", "falling", "rising_then_falling"))
@pytest.mark.parametrize("keep_window_size", (1, 2, 64, 299, 300))
def test_sorted_scores(order, keep_window_size):
    score = torch.arange(300.0)
    score = {"rising": score, "falling": -score, "rising_then_falling": -(score - 150).abs()}[order]
    check(score.view(1, 1, -1), keep_window_size)


def test_equal_scores_are_a_sliding_window():
    dense = DynamicMask.from_score(torch.zeros(1, 1, 70), 16).to_dense()
    distance = torch.arange(70)[:, None] - torch.arange(70)
    assert torch.equal(dense[0, 0], (distance >= 0) & (distance < 16))


def test_zeros_of_both_signs_are_equal():
    score = torch.tensor([0.0, -0.0, 0.0, -0.0]).view(1, 1, 4)
    for dtype in DTYPES:
        assert DynamicMask.from_score(score.to(dtype), 2).end.tolist() == [[[2, 3, 4, 4]]]


def test_nan_ranks_below_minus_infinity():
    score = torch.tensor([-math.inf, math.nan, -math.nan, -math.inf]).view(1, 1, 4)
    for dtype in DTYPES:
        # 0 and 3 are the best two; 1 is there until 2 (newer) comes, 2 until 3 does.
        assert DynamicMask.from_score(score.to(dtype), 2).end.tolist() == [[[4, 2, 3, 4]]]
        assert DynamicMask.from_score(score.to(dtype), 2, is_causal=False).end.tolist() == [[[4, 0, 0, 4]]]


def test_scores_that_differ_in_the_last_bit_do_not_tie():
    for dtype in DTYPES:
        score = torch.tensor([1 + torch.finfo(dtype).eps, 1], dtype=dtype).view(1, 1, 2)
        assert DynamicMask.from_score(score, 1).end.tolist() == [[[2, 1]]]
        assert DynamicMask.from_score(-score, 1).end.tolist() == [[[1, 2]]]


def test_subnormal_scores_are_ranked():
    for dtype in DTYPES:
        tiny = torch.finfo(dtype).smallest_normal / 4
        score = torch.tensor([tiny, 0.0, -tiny], dtype=dtype).view(1, 1, 3)
        assert DynamicMask.from_score(score, 1).end.tolist() == [[[3, 1, 2]]]


def test_padding_is_never_visible_and_beats_nobody():
    score = torch.tensor([1.0, 9.0, 2.0, 9.0, 3.0]).view(1, 1, 5)
    padding = torch.tensor([[True, False, True, False, True]])
    mask = DynamicMask.from_score(score, 2, key_padding_mask=padding)
    assert mask.end.tolist() == [[[4, 1, 5, 3, 5]]]
    assert torch.equal(mask.to_dense()[0, 0, -1], torch.tensor([False, False, True, False, True]))
    everything = DynamicMask.from_score(score, 5, key_padding_mask=padding)
    assert torch.equal(everything.to_dense(), (reference.causal_mask(5, 5) & padding)[None, None])


def test_all_padding():
    for is_causal in (False, True):
        padding = torch.zeros(1, 6, dtype=torch.bool)
        mask = DynamicMask.from_score(torch.randn(2, 1, 6), 2, is_causal=is_causal, key_padding_mask=padding)
        assert not mask.to_dense().any()


def test_not_causal_is_one_selection_for_every_query():
    generator = make_generator(3)
    score = random_score(generator, 2, 2, 50, levels=5)
    dense = check(score, 7, is_causal=False, query_len=9).to_dense()
    assert torch.equal(dense, dense[:, :, :1].expand_as(dense))
    assert (dense.sum(-1) == 7).all()


@pytest.mark.parametrize("is_causal", (False, True))
def test_window_of_all_keys_hides_none(is_causal):
    score = torch.randn(1, 2, 40)
    for keep_window_size in (40, 41, 10**6, 2**31 - 1):
        dense = DynamicMask.from_score(score, keep_window_size, is_causal=is_causal, query_len=30).to_dense()
        expected = reference.causal_mask(30, 40) if is_causal else torch.ones(30, 40, dtype=torch.bool)
        assert torch.equal(dense, expected.expand_as(dense))


def test_a_single_query_sees_the_best_of_everything():
    score = torch.randn(2, 3, 500)
    dense = DynamicMask.from_score(score, 32, query_len=1).to_dense()
    assert torch.equal(
        dense, torch.zeros(2, 3, 1, 500, dtype=torch.bool).scatter(-1, score.topk(32).indices[:, :, None], True)
    )


def test_any_strides():
    generator = make_generator(5)
    score = random_score(generator, 3, 70, 2, levels=6)
    for view in (
        score.transpose(1, 2),
        score.transpose(1, 2)[:, :, ::3],
        score[:1, :, :1].transpose(1, 2).expand(3, 2, 70),
    ):
        assert torch.equal(DynamicMask.from_score(view, 9).end, DynamicMask.from_score(view.contiguous(), 9).end)
    padding = torch.rand(70, 3, generator=generator) < 0.5
    for view in (padding.T, padding.T[:1].expand(3, 70), padding.T[:1]):
        check(score.transpose(1, 2), 9, key_padding_mask=view)


def test_attributes():
    mask = DynamicMask.from_score(torch.randn(2, 3, 20), 4, query_len=6)
    assert mask.keep_window_size == 4
    assert mask.is_causal is True
    assert tuple(mask.shape) == (2, 3, 6, 20)
    assert tuple(mask.end.shape) == (2, 3, 20)
    assert DynamicMask.from_score(torch.randn(2, 3, 20), 4, is_causal=False).is_causal is False
    assert tuple(DynamicMask.from_score(torch.randn(2, 3, 20), 4).shape) == (2, 3, 20, 20)


@pytest.mark.parametrize("query_len, key_len", ((50, 50), (1, 50), (20, 50), (50, 20)))
def test_density_is_visible_pairs_over_causal_pairs(query_len, key_len):
    generator = make_generator(7)
    score = random_score(generator, 2, 3, key_len, levels=4)
    causal_pairs = int(reference.causal_mask(query_len, key_len).sum()) * 6
    for window, padding in ((5, None), (5, torch.rand(2, key_len, generator=generator) < 0.7), (key_len, None)):
        mask = DynamicMask.from_score(score, window, query_len=query_len, key_padding_mask=padding)
        assert mask.density() == pytest.approx(int(mask.to_dense().sum()) / causal_pairs)
    assert DynamicMask.from_score(score, key_len, query_len=query_len).density() == 1


def test_selection_is_not_differentiated():
    score = torch.randn(1, 1, 10, requires_grad=True)
    assert not DynamicMask.from_score(score, 3).end.requires_grad


@pytest.mark.parametrize("size", ((0, 2, 5), (2, 2, 0)))
def test_empty(size):
    mask = DynamicMask.from_score(torch.zeros(size), 3)
    assert tuple(mask.end.shape) == size
    assert tuple(mask.to_dense().shape) == (*size, size[-1])
