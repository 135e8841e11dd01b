"""The dynamic mask in torch operations gives what the engine gives, bit for bit."""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

import test_dynamic_mask
from devices import generator as make_generator
from devices import on_gpu
from flash_dmattn import operators, selection

pytestmark = pytest.mark.usefixtures("device")


@pytest.fixture
def by_selection(monkeypatch):
    """`DynamicMask` and `keep_window_size` as where the engine has no kernels."""
    monkeypatch.setattr("flash_dmattn.dynamic_mask._maker", lambda score: selection)


def scores(data, *size):
    """Of any dtype, with ties, infinities and NaN."""
    random = make_generator(data.draw(st.integers(0, 2**32 - 1)))
    score = torch.randn(size, generator=random)
    levels = data.draw(st.sampled_from((None, 1, 3, 40)))
    if levels is not None:
        score = (score * levels).round() / levels
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 1e-45, -1e-45])
    which = torch.randint(60, size, generator=random)
    score = torch.where(which < len(special), special[which % len(special)], score)
    return score.to(data.draw(st.sampled_from(test_dynamic_mask.DTYPES))), random


@hypothesis.settings(max_examples=3 * hypothesis.settings().max_examples)
@hypothesis.given(data=st.data(), is_causal=st.booleans())
def test_ends_and_survivors(data, is_causal):
    key_len = data.draw(st.one_of(st.integers(1, 80), st.integers(1, 1300)))
    batch, heads, query_len = (data.draw(st.integers(1, high)) for high in (2, 3, 80))
    window = data.draw(st.one_of(st.integers(1, 20), st.integers(1, key_len + 2), st.just(2**31 - 1)))
    score, random = scores(data, batch, heads, key_len)
    visible = None
    if data.draw(st.booleans()):
        visible = torch.rand(data.draw(st.sampled_from((1, batch))), key_len, generator=random) < 0.7
    end, survivors = selection.dynamic_mask(score, visible, window, query_len, is_causal)
    expected, expected_survivors = operators.dynamic_mask(score, visible, window, query_len, is_causal)
    assert end.dtype == torch.int32 and torch.equal(end, expected)
    if not is_causal:
        assert survivors.numel() == 0
        return
    chunk = operators.survivor_chunk(window)
    starts = range(0, key_len, chunk)
    assert survivors.dtype == torch.int32 and survivors.shape == (batch, heads, len(starts), min(window, key_len))
    if on_gpu():
        assert torch.equal(survivors.sort(-1).values, expected_survivors.sort(-1).values)
    key = torch.arange(key_len)
    for c, start in enumerate(starts):
        there = torch.zeros(batch, heads, key_len + 1, dtype=torch.bool)
        there.scatter_(-1, survivors[:, :, c].long() % (key_len + 1), True)
        assert torch.equal(there[..., :-1], (key < start) & (end >= start))
        assert torch.equal(there[..., :-1].sum(-1), (survivors[:, :, c] >= 0).sum(-1))


@hypothesis.given(data=st.data(), is_causal=st.booleans())
def test_best_keys_of_rows(data, is_causal):
    batch, heads, query_len, key_len = (data.draw(st.integers(1, high)) for high in (2, 3, 40, 60))
    score, random = scores(data, batch, heads, query_len, key_len)
    visible = torch.rand(score.shape, generator=random) < 0.7 if data.draw(st.booleans()) else None
    window = data.draw(st.one_of(st.integers(1, 8), st.integers(1, key_len + 2)))
    expected = operators.select_keys(score, visible, window, is_causal)
    assert torch.equal(selection.select_keys(score, visible, window, is_causal), expected)


def test_best_keys_of_rows_in_parts(monkeypatch):
    monkeypatch.setattr(selection, "PAIRS_AT_ONCE", 1000)
    score = torch.randint(4, (2, 3, 50, 40), generator=make_generator(0)).float()
    visible = score > 0
    expected = operators.select_keys(score, visible, 5, True)
    assert torch.equal(selection.select_keys(score, visible, 5, True), expected)


@pytest.mark.parametrize("size", ((0, 2, 5), (2, 2, 0)))
def test_empty(size, by_selection):
    test_dynamic_mask.test_empty(size)
    assert selection.select_keys(torch.zeros(*size[:2], 3, size[2]), None, 3, True).shape == (*size[:2], 3, size[2])


def test_special_scores(by_selection):
    test_dynamic_mask.test_zeros_of_both_signs_are_equal()
    test_dynamic_mask.test_nan_ranks_below_minus_infinity()
    test_dynamic_mask.test_subnormal_scores_are_ranked()
    test_dynamic_mask.test_scores_that_differ_in_the_last_bit_do_not_tie()
    test_dynamic_mask.test_padding_is_never_visible_and_beats_nobody()
    test_dynamic_mask.test_all_padding()
    test_dynamic_mask.test_any_strides()
