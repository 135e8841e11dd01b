"""What FlexAttention does not give on GPUs, from its definition in PyTorch's own operators, some rows at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .tiles import Tiles

PAIRS = 2**26  # of queries and keys that are worked at together


def probabilities(tiles: Tiles, lse: Tensor, scale: float, softcap: float) -> Tensor:
    """(T, H, Q, K) in the query's dtype. lse (T, H, Q)."""
    probs = tiles.query.new_empty((*tiles.query.shape[:3], tiles.key.size(2)))
    for rows in _rows(tiles):
        probs[:, :, rows] = _probabilities(tiles, rows, lse, scale, softcap).to(probs.dtype)
    return probs


class DeterministicBiasGradient(torch.autograd.Function):
    """out and lse as they are; the bias gets its gradient, which FlexAttention adds up in any order, in the same one
    each time."""

    @staticmethod
    def forward(
        ctx: Any, out: Tensor, lse: Tensor, bias: Tensor, tiles: Tiles, scale: float, softcap: float
    ) -> tuple[Tensor, Tensor]:
        ctx.has_mask = tiles.mask is not None
        tensors = [x for x in tiles._replace(bias=bias) if x is not None]
        ctx.save_for_backward(out, lse, *tensors)
        ctx.options = scale, softcap
        return out.view_as(out), lse.view_as(lse)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        out, lse, *tensors = ctx.saved_tensors
        if not ctx.has_mask:
            tensors.insert(5, None)
        tiles = Tiles(*tensors)
        bias = tiles.bias
        assert bias is not None
        delta = (out.float() * grad_out.float()).sum(-1) - grad_lse
        grad_bias = torch.zeros_like(bias, dtype=torch.float32)
        for rows in _rows(tiles):
            grad_probs = _by_heads(grad_out[:, :, rows].float(), tiles.value.float().mT)
            grad = _probabilities(tiles, rows, lse, *ctx.options) * (grad_probs - delta[:, :, rows, None])
            part = grad_bias[:, :, rows] if bias.size(2) > 1 else grad_bias
            heads = grad.size(1) // bias.size(1)
            part += grad.unflatten(1, (-1, heads)).sum(2).sum_to_size(part.shape)
        return grad_out, grad_lse, grad_bias.to(bias.dtype), None, None, None


def _rows(tiles: Tiles) -> Iterator[slice]:
    count, heads, query_len, _ = tiles.query.shape
    step = max(1, PAIRS // (count * heads * tiles.key.size(2)))
    return (slice(first, min(first + step, query_len)) for first in range(0, query_len, step))


def _probabilities(tiles: Tiles, rows: slice, lse: Tensor, scale: float, softcap: float) -> Tensor:
    """float32 (T, H, rows, K). A row that sees nothing has an lse of -inf, and gives 0."""
    scores = _by_heads(tiles.query[:, :, rows].float(), tiles.key.float().mT) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    heads, positions = scores.size(1), torch.arange(tiles.query.size(2), device=scores.device)[rows, None]
    if tiles.bias is not None:
        scores = scores + _of_rows(tiles.bias, rows, heads)
    visible = (tiles.start[:, :, None] <= positions) & (positions < tiles.end[:, :, None])
    if tiles.mask is not None:
        visible = visible & _of_rows(tiles.mask, rows, heads)
    lse = lse[:, :, rows, None]
    return torch.where(visible & (lse > -math.inf), (scores - lse).exp(), 0.0)


def _of_rows(pairs: Tensor, rows: slice, heads: int) -> Tensor:
    """A mask or bias, with 1 or as many heads as the query has."""
    pairs = pairs[:, :, rows] if pairs.size(2) > 1 else pairs
    return pairs if pairs.size(1) in (1, heads) else pairs.repeat_interleave(heads // pairs.size(1), dim=1)


def _by_heads(left: Tensor, right: Tensor) -> Tensor:
    """left (T, H, R, D) @ right (T, Hk | H, D, K): query heads by their KV heads."""
    group = left.size(1) // right.size(1)
    rows = left.unflatten(1, (-1, group)).flatten(2, 3) @ right
    return rows.unflatten(2, (group, -1)).flatten(1, 2)
