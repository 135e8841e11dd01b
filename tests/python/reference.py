"""Attention and the dynamic mask written straight from their definitions, in plain torch.

Slow and large on purpose: every (query, key) pair is there. Gradients come from autograd. The dtype of the tensors is
the dtype of the evaluation: float64 copies give the reference, the tensors themselves what plain torch makes of them.
"""

import math

import torch


def expand_heads(x, num_heads):
    """(b, h, ...) -> (b, num_heads, ...): query head i reads head i // (num_heads // h)."""
    return x.repeat_interleave(num_heads // x.shape[1], dim=1)


def causal_mask(query_len, key_len):
    """(Q, K) bool: query q sees the keys <= q + K - Q."""
    return torch.arange(key_len) <= torch.arange(query_len)[:, None] + key_len - query_len


def beats(score):
    """score (..., K) -> (..., K, K) bool, [j, k]: key j beats key k. Newer keys win among equals, NaN is below all."""
    j, k = score[..., :, None], score[..., None, :]
    position = torch.arange(score.shape[-1])
    equal = (j == k) | (j.isnan() & k.isnan())
    return (j > k) | (~j.isnan() & k.isnan()) | (equal & (position[:, None] > position))


def select(score, visible, keep_window_size):
    """The keys that fewer than keep_window_size visible keys beat, among the visible.

    score (B, heads, K), visible (B, heads, Q, K) bool -> (B, heads, Q, K) bool.
    """
    return visible & (visible.float() @ beats(score).float() < keep_window_size)


def select_rows(score, visible, keep_window_size):
    """The same where each row has scores of its own, (B, heads, Q, K), none NaN: by sorting, newest keys first."""
    order = score.flip(-1).sort(dim=-1, descending=True, stable=True).indices
    seen = visible.flip(-1).gather(-1, order)
    kept = seen & (seen.cumsum(-1) <= keep_window_size)
    return torch.zeros_like(visible).scatter(-1, order, kept).flip(-1)


def dynamic_mask(score, keep_window_size, query_len, is_causal=True, key_padding_mask=None):
    """score (B, heads, K), key_padding_mask (B | 1, K) bool -> (B, heads, Q, K) bool."""
    batch, heads, key_len = score.shape
    visible = causal_mask(query_len, key_len) if is_causal else torch.ones(query_len, key_len, dtype=torch.bool)
    visible = visible.expand(batch, heads, query_len, key_len)
    if key_padding_mask is not None:
        visible = visible & key_padding_mask[:, None, None, :]
    return select(score, visible, keep_window_size)


def logits(query, key, bias, visible, scale, softcap):
    """(B, H, Q, K) scores before the softmax, -inf where the key is masked."""
    s = torch.einsum("bqhd,bkhd->bhqk", query, key.repeat_interleave(query.shape[2] // key.shape[2], dim=2)) * scale
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    if bias is not None:
        s = s + expand_heads(bias, query.shape[2])
    return s if visible is None else s.masked_fill(~expand_heads(visible, query.shape[2]), -math.inf)


def attention(query, key, value, bias=None, visible=None, scale=None, softcap=None):
    """query (B, Q, H, D), key and value (B, K, Hk, D), bias and visible (B | 1, 1 | Hk | H, 1 | Q, 1 | K)
    -> out (B, Q, H, D), lse (B, H, Q), probs (B, H, Q, K)."""
    batch, query_len, heads, head_dim = query.shape
    key_len = key.shape[1]
    if key_len == 0:
        lse = query.new_full((batch, heads, query_len), -math.inf)
        return torch.zeros_like(query), lse, query.new_zeros(batch, heads, query_len, 0)
    s = logits(query, key, bias, visible, head_dim**-0.5 if scale is None else scale, softcap)
    sees_nothing = (s == -math.inf).all(-1)
    s = s.masked_fill(sees_nothing[..., None], 0)
    lse = torch.logsumexp(s, -1).masked_fill(sees_nothing, -math.inf)
    probs = torch.softmax(s, -1).masked_fill(sees_nothing[..., None], 0).to(value.dtype)
    out = torch.einsum("bhqk,bkhd->bqhd", probs, value.repeat_interleave(heads // value.shape[2], dim=2))
    return out, lse, probs


def causal_end(visible):
    """(..., Q = K, K) bool, the causal mask of a dynamic mask -> (..., K): end of each key's interval of positions."""
    key_len = visible.shape[-1]
    position = torch.arange(key_len)
    return torch.where(visible, position[:, None] + 1, position).amax(-2) if key_len else visible.sum(-2)
