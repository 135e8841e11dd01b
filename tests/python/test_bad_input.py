"""Every kind of bad input is refused with a message that names the argument, what it got and what it takes."""

import re

import numpy
import pytest
import torch

from flash_dmattn import DynamicMask, flash_dmattn_func

ATTENTION = {
    "query is not a tensor": (
        {"query": numpy.zeros((2, 6, 4, 8))},
        (TypeError, "query is ndarray; it takes a torch.Tensor (batch, query_len, heads, head_dim)"),
    ),
    "query rank": (
        {"query": torch.zeros(2, 6, 8)},
        (ValueError, "query has shape (2, 6, 8); it takes 4 dimensions (batch, query_len, heads, head_dim)"),
    ),
    "key rank": (
        {"key": torch.zeros(2, 10, 16)},
        (ValueError, "key has shape (2, 10, 16); it takes 4 dimensions (batch, key_len, kv_heads, head_dim)"),
    ),
    "value is None": (
        {"value": None},
        (TypeError, "value is NoneType; it takes a torch.Tensor (batch, key_len, kv_heads, head_dim)"),
    ),
    "query dtype": (
        {"query": torch.zeros(2, 6, 4, 8, dtype=torch.int32)},
        (TypeError, "query is int32; it takes float16 or bfloat16 or float32 or float64"),
    ),
    "key dtype": ({"key": torch.zeros(2, 10, 2, 8).half()}, (TypeError, "key is float16; it takes float32")),
    "value dtype": ({"value": torch.zeros(2, 10, 2, 8).double()}, (TypeError, "value is float64; it takes float32")),
    "key device": (
        {"key": torch.zeros(2, 10, 2, 8, device="meta")},
        (ValueError, "key is on meta; it takes a tensor on cpu, as query"),
    ),
    "unknown device": (
        {name: torch.zeros(2, 6, 4, 8, device="meta") for name in ("query", "key", "value")},
        (ValueError, "query is on meta; the cpu backend takes tensors on cpu"),
    ),
    "sparse": (
        {"value": torch.zeros(2, 10, 2, 8).to_sparse()},
        (TypeError, "value has layout torch.sparse_coo; it takes a dense (torch.strided) tensor"),
    ),
    "batch": (
        {"key": torch.zeros(3, 10, 2, 8)},
        (ValueError, "key has shape (3, 10, 2, 8); it takes (batch, key_len, kv_heads, head_dim) with query's batch 2"),
    ),
    "head dims differ": (
        {"key": torch.zeros(2, 10, 2, 16)},
        (
            ValueError,
            "key has shape (2, 10, 2, 16); it takes (batch, key_len, kv_heads, head_dim) with query's batch",
        ),
    ),
    "head dim 0": (
        {name: torch.zeros(2, 6, 2, 0) for name in ("query", "key", "value")},
        (ValueError, "query has head_dim 0; it takes 1 to 256"),
    ),
    "head dim 257": (
        {name: torch.zeros(2, 6, 2, 257) for name in ("query", "key", "value")},
        (ValueError, "query has head_dim 257; it takes 1 to 256"),
    ),
    "head ratio": (
        {"key": torch.zeros(2, 10, 3, 8), "value": torch.zeros(2, 10, 3, 8)},
        (ValueError, "key has 3 heads; it takes a number that divides query's 4"),
    ),
    "more key heads than query heads": (
        {"key": torch.zeros(2, 10, 8, 8), "value": torch.zeros(2, 10, 8, 8)},
        (ValueError, "key has 8 heads; it takes a number that divides query's 4"),
    ),
    "no heads": (
        {"key": torch.zeros(2, 10, 0, 8), "value": torch.zeros(2, 10, 0, 8)},
        (ValueError, "key has 0 heads; it takes a number that divides query's 4"),
    ),
    "value shape": (
        {"value": torch.zeros(2, 11, 2, 8)},
        (ValueError, "value has shape (2, 11, 2, 8); it takes key's (2, 10, 2, 8)"),
    ),
    "last dimension": (
        {"query": torch.zeros(2, 6, 8, 4).transpose(2, 3)},
        (ValueError, "query has strides (192, 32, 1, 4); it takes a contiguous last dimension (stride 1)"),
    ),
    "mask type": (
        {"attn_mask": [[True]]},
        (TypeError, "attn_mask is list; it takes a torch.Tensor or a DynamicMask"),
    ),
    "mask rank": (
        {"attn_mask": torch.ones(6, 10)},
        (ValueError, "attn_mask has shape (6, 10); it takes 4 dimensions (batch, heads, query_len, key_len)"),
    ),
    "mask dtype": (
        {"attn_mask": torch.ones(1, 1, 6, 10, dtype=torch.complex64)},
        (TypeError, "attn_mask is complex64; it takes bool, or numbers: 1 visible, 0 masked"),
    ),
    "mask broadcast": (
        {"attn_mask": torch.ones(2, 3, 6, 10)},
        (
            ValueError,
            "attn_mask has shape (2, 3, 6, 10); it takes (batch, heads, query_len, key_len) = "
            "(1 | 2, 1 | 2 | 4, 1 | 6, 1 | 10)",
        ),
    ),
    "mask device": (
        {"attn_mask": torch.ones(1, 1, 6, 10, device="meta")},
        (ValueError, "attn_mask is on meta; it takes a tensor on cpu, as query"),
    ),
    "dynamic mask query length": (
        {"attn_mask": DynamicMask.from_score(torch.zeros(2, 2, 10), 3)},
        (
            ValueError,
            "attn_mask (a DynamicMask) has shape (2, 2, 10, 10); it takes (batch, heads, query_len, key_len) = "
            "(1 | 2, 1 | 2 | 4, 6, 10)",
        ),
    ),
    "dynamic mask key length": (
        {"attn_mask": DynamicMask.from_score(torch.zeros(2, 2, 1), 3, query_len=6)},
        (
            ValueError,
            "attn_mask (a DynamicMask) has shape (2, 2, 6, 1); it takes (batch, heads, query_len, key_len) = "
            "(1 | 2, 1 | 2 | 4, 6, 10)",
        ),
    ),
    "dynamic mask heads": (
        {"attn_mask": DynamicMask.from_score(torch.zeros(2, 3, 10), 3, query_len=6)},
        (ValueError, "attn_mask (a DynamicMask) has shape (2, 3, 6, 10); it takes (batch, heads, query_len, key_len)"),
    ),
    "dynamic mask device": (
        {
            "attn_mask": DynamicMask(
                torch.zeros(2, 2, 10, dtype=torch.int32, device="meta"), 3, is_causal=True, query_len=6
            )
        },
        (ValueError, "attn_mask is on meta; it takes a tensor on cpu, as query"),
    ),
    "bias type": (
        {"attn_bias": 1.0},
        (TypeError, "attn_bias is float; it takes a torch.Tensor (batch, heads, query_len, key_len)"),
    ),
    "bias rank": (
        {"attn_bias": torch.zeros(2, 2, 10)},
        (ValueError, "attn_bias has shape (2, 2, 10); it takes 4 dimensions (batch, heads, query_len, key_len)"),
    ),
    "bias dtype": (
        {"attn_bias": torch.zeros(1, 1, 6, 10).half()},
        (TypeError, "attn_bias is float16; it takes float32"),
    ),
    "bias broadcast": (
        {"attn_bias": torch.zeros(2, 2, 5, 10)},
        (ValueError, "attn_bias has shape (2, 2, 5, 10); it takes (batch, heads, query_len, key_len)"),
    ),
    "bias device": (
        {"attn_bias": torch.zeros(1, 1, 6, 10, device="meta")},
        (ValueError, "attn_bias is on meta; it takes a tensor on cpu, as query"),
    ),
    "scale type": ({"scale": "0.5"}, (TypeError, "scale is str; it takes a float or None")),
    "scale is a tensor": ({"scale": torch.tensor(0.5)}, (TypeError, "scale is Tensor; it takes a float or None")),
    "scale is infinite": ({"scale": float("inf")}, (ValueError, "scale is inf; it takes a finite number or None")),
    "scale is NaN": ({"scale": float("nan")}, (ValueError, "scale is nan; it takes a finite number or None")),
    "softcap type": ({"softcap": True}, (TypeError, "softcap is bool; it takes a float or None")),
    "softcap 0": ({"softcap": 0.0}, (ValueError, "softcap is 0.0; it takes a finite number above 0 or None")),
    "softcap negative": ({"softcap": -2}, (ValueError, "softcap is -2; it takes a finite number above 0 or None")),
    "is_causal": ({"is_causal": 1}, (TypeError, "is_causal is int; it takes True, False or None")),
    "deterministic": ({"deterministic": "yes"}, (TypeError, "deterministic is str; it takes True, False or None")),
    "return_attn_probs": (
        {"return_attn_probs": 1},
        (TypeError, "return_attn_probs is int; it takes True, False or None"),
    ),
    "window type": (
        {"keep_window_size": 4.0, "attn_bias": torch.zeros(2, 2, 1, 10)},
        (TypeError, "keep_window_size is float; it takes an int"),
    ),
    "window negative": (
        {"keep_window_size": -1, "attn_bias": torch.zeros(2, 2, 1, 10)},
        (ValueError, "keep_window_size is -1; it takes 1 or more"),
    ),
    "window 0": (
        {"keep_window_size": 0, "attn_bias": torch.zeros(2, 2, 1, 10)},
        (ValueError, "keep_window_size is 0; it takes 1 or more"),
    ),
    "window without bias": (
        {"keep_window_size": 4},
        (ValueError, "keep_window_size is 4; without attn_bias, whose values score the keys, it takes None"),
    ),
    "window with dynamic mask": (
        {
            "keep_window_size": 4,
            "attn_bias": torch.zeros(2, 2, 1, 10),
            "attn_mask": DynamicMask.from_score(torch.zeros(2, 2, 10), 3, query_len=6),
        },
        (ValueError, "keep_window_size is 4; with a DynamicMask as attn_mask, which has one, it takes None"),
    ),
}

SCORES = {
    "score type": ({"score": [0.0]}, (TypeError, "score is list; it takes a torch.Tensor (batch, heads, key_len)")),
    "score rank": (
        {"score": torch.zeros(2, 10)},
        (ValueError, "score has shape (2, 10); it takes 3 dimensions (batch, heads, key_len)"),
    ),
    "score dtype": (
        {"score": torch.zeros(2, 2, 10, dtype=torch.int64)},
        (TypeError, "score is int64; it takes float16 or bfloat16 or float32 or float64"),
    ),
    "window type": ({"keep_window_size": None}, (TypeError, "keep_window_size is NoneType; it takes an int")),
    "window negative": ({"keep_window_size": -3}, (ValueError, "keep_window_size is -3; it takes 1 or more")),
    "is_causal": ({"is_causal": "no"}, (TypeError, "is_causal is str; it takes True, False or None")),
    "query_len type": ({"query_len": 6.0}, (TypeError, "query_len is float; it takes an int")),
    "query_len negative": ({"query_len": -1}, (ValueError, "query_len is -1; it takes 0 or more")),
    "padding type": (
        {"key_padding_mask": [True]},
        (TypeError, "key_padding_mask is list; it takes a torch.Tensor (batch, key_len)"),
    ),
    "padding rank": (
        {"key_padding_mask": torch.ones(2, 1, 1, 10)},
        (ValueError, "key_padding_mask has shape (2, 1, 1, 10); it takes 2 dimensions (batch, key_len)"),
    ),
    "padding dtype": (
        {"key_padding_mask": torch.ones(2, 10, dtype=torch.complex64)},
        (TypeError, "key_padding_mask is complex64; it takes bool, or numbers: 1 visible, 0 masked"),
    ),
    "padding shape": (
        {"key_padding_mask": torch.ones(2, 9)},
        (ValueError, "key_padding_mask has shape (2, 9); it takes (batch, key_len) = (1 | 2, 10), as score"),
    ),
    "padding device": (
        {"key_padding_mask": torch.ones(2, 10, device="meta")},
        (ValueError, "key_padding_mask is on meta; it takes a tensor on cpu, as score"),
    ),
}


def by_name(cases):
    return [pytest.param(*case, id=name.replace(" ", "-")) for name, case in cases.items()]


@pytest.mark.parametrize("arguments, error", by_name(ATTENTION))
def test_attention(arguments, error):
    good = {"query": torch.zeros(2, 6, 4, 8), "key": torch.zeros(2, 10, 2, 8), "value": torch.zeros(2, 10, 2, 8)}
    flash_dmattn_func(**good)
    with pytest.raises(error[0], match=f"^{re.escape(error[1])}"):
        flash_dmattn_func(**{**good, **arguments})


@pytest.mark.parametrize("arguments, error", by_name(SCORES))
def test_dynamic_mask(arguments, error):
    good = {"score": torch.zeros(2, 2, 10), "keep_window_size": 3}
    DynamicMask.from_score(**good)
    with pytest.raises(error[0], match=f"^{re.escape(error[1])}"):
        DynamicMask.from_score(**{**good, **arguments})


@pytest.mark.parametrize("check", (False, True))
def test_nan_scores_are_refused_when_they_are_checked(check, monkeypatch):
    monkeypatch.setenv("FLASH_DMATTN_CHECK", "1" if check else "0")
    query, key = torch.zeros(1, 6, 2, 8), torch.zeros(1, 10, 2, 8)
    score = torch.zeros(1, 2, 10)
    score[0, 1, 3] = torch.nan
    calls = {
        "score": lambda: DynamicMask.from_score(score, 3),
        "attn_bias": lambda: flash_dmattn_func(query, key, key, attn_bias=score[:, :, None], keep_window_size=3),
    }
    for name, call in calls.items():
        if check:
            with pytest.raises(ValueError, match=f"^{name} holds NaN; it takes numbers that can be compared"):
                call()
        else:
            call()


def test_operators_refuse_what_they_would_misread():
    """Called directly, an operator still reads and writes nothing out of bounds."""
    query = torch.zeros(1, 6, 2, 8)
    operator = torch.ops.flash_dmattn.forward
    # PyTorch makes an exception of C++ a ValueError in some versions, in others a RuntimeError.
    with pytest.raises((ValueError, RuntimeError), match="query has 3 dimensions; it takes 4"):
        operator(query[0], query, query, *[None] * 4, 1.0, 0.0, False, False)
    with pytest.raises((ValueError, RuntimeError), match="key has dtype Long"):
        operator(query, query.long(), query, *[None] * 4, 1.0, 0.0, False, False)
    with pytest.raises((ValueError, RuntimeError), match="needs_bias_grad is true without a bias"):
        lse = torch.zeros(1, 2, 6)
        torch.ops.flash_dmattn.backward(
            *(query, None, query, query, query, query, lse, *[None] * 5, 1.0, 0.0, False, False, True)
        )
