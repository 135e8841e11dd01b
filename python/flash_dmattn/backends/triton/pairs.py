"""What has a value for every query and key: probabilities, and the gradient of a bias that has one.

A program has a tile of queries and a tile of keys, and tests every pair by the mask as it is: no list is made.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...problem import Problem
from . import plan
from .tiles import NO_BIAS, is_visible, load_ends, load_rows, logits, probability, product, to_base_2

BLOCK_M, BLOCK_N = 64, 64


def probabilities(problem: Problem, lse: Tensor) -> Tensor:
    """exp(logit - lse) for every pair: (B, H, Q, K), the query's dtype."""
    layout = plan.make_layout(problem)
    probs = problem.query.new_empty((layout.batch, layout.heads, layout.query_len, layout.key_len))
    if probs.numel() == 0:
        return probs
    tiles = triton.cdiv(layout.query_len, BLOCK_M) * triton.cdiv(layout.key_len, BLOCK_N)
    _probabilities[(tiles * layout.batch * layout.heads,)](
        **_arguments(problem, layout), lse=lse.contiguous(), probs=probs, num_warps=4
    )
    return probs


def bias_gradient(problem: Problem, lse_2: Tensor, delta: Tensor, grad_out: Tensor) -> Tensor:
    """Of a bias with a value for each query and key, in its own shape: summed over what it was broadcast over.

    lse_2 and delta (B, H, Q), as the backward pass prepares them.
    """
    layout, bias = plan.make_layout(problem), problem.bias
    assert bias is not None
    grad_bias = torch.empty(bias.shape, dtype=bias.dtype, device=bias.device)
    tiles = triton.cdiv(layout.query_len, BLOCK_M) * triton.cdiv(layout.key_len, BLOCK_N)
    _bias_gradient[(tiles * bias.size(0) * bias.size(1),)](
        **_arguments(problem, layout),
        value=problem.value,
        value_b=problem.value.stride(0),
        value_k=problem.value.stride(1),
        value_h=problem.value.stride(2),
        grad_out=grad_out,
        grad_out_b=grad_out.stride(0),
        grad_out_q=grad_out.stride(1),
        grad_out_h=grad_out.stride(2),
        lse=lse_2,
        delta=delta,
        grad_bias=grad_bias,
        bias_batch=bias.size(0),
        num_warps=4 if layout.head_dim <= 128 and problem.query.element_size() == 2 else 8,
        num_stages=2 if layout.head_dim <= 128 and problem.query.element_size() == 2 else 1,
    )
    return grad_bias


def _arguments(problem: Problem, layout: plan.Layout) -> dict[str, Any]:
    query, key, _, mask, bias, end, *_ = problem
    mask_strides, bias_strides = plan.broadcast_strides(mask), plan.broadcast_strides(bias)
    return {
        "query": query,
        "key": key,
        "bias": query if bias is None else bias.detach(),
        "mask": query if mask is None else mask.view(torch.uint8),
        "end": query if end is None else end.contiguous(),
        "query_b": query.stride(0),
        "query_q": query.stride(1),
        "query_h": query.stride(2),
        "key_b": key.stride(0),
        "key_k": key.stride(1),
        "key_h": key.stride(2),
        **{f"bias_{x}": stride for x, stride in zip("bhqk", bias_strides, strict=True)},
        **{f"mask_{x}": stride for x, stride in zip("bhqk", mask_strides, strict=True)},
        "end_b": 0 if end is None or end.size(0) == 1 else end.size(1) * end.size(2),
        "batch": layout.batch,
        "heads": layout.heads,
        "kv_heads": layout.kv_heads,
        "bias_heads": 1 if bias is None else bias.size(1),
        "mask_heads": 1 if mask is None else mask.size(1),
        "end_heads": 1 if end is None else end.size(1),
        "query_len": layout.query_len,
        "key_len": layout.key_len,
        "factor": plan.logit_factor(problem),
        "softcap": problem.softcap,
        "HEAD_DIM": layout.head_dim,
        "BLOCK_D": plan.block_d(layout),
        "CAUSAL": problem.is_causal,
        "HAS_END": end is not None,
        "HAS_MASK": mask is not None,
        "BIAS": plan.bias_kind(bias),
        "SOFTCAP": problem.softcap > 0,
        "BLOCK_M": BLOCK_M,
        "BLOCK_N": BLOCK_N,
    }


RUN_TIME = [
    "batch", "heads", "kv_heads", "bias_heads", "mask_heads", "end_heads", "query_len", "key_len", "factor", "softcap",
    "end_b", "bias_batch",
]  # fmt: skip


@triton.jit
def _place(query_len, key_len, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The queries and keys of this program's tile, and which of the planes of all queries and keys it is in."""
    k_tiles = tl.cdiv(key_len, BLOCK_N)
    q_tiles = tl.cdiv(query_len, BLOCK_M)
    pid = tl.program_id(0)
    k = pid % k_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    q = pid // k_tiles % q_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    return q, k, pid // k_tiles // q_tiles


@triton.jit
def _logits_of(
    b, head, q, k, query, key, bias, mask, end, query_b, query_q, query_h, key_b, key_k, key_h,
    bias_b, bias_h, bias_q, bias_k, mask_b, mask_h, mask_q, mask_k, end_b,
    heads, kv_heads, bias_heads, mask_heads, end_heads, query_len, key_len, factor, softcap,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr, HAS_END: tl.constexpr,
    HAS_MASK: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """(queries, keys) logits in base 2, -inf where a pair is not visible; and the pairs that are there."""
    q_exist = q < query_len
    k_exist = k < key_len
    q_row, k_row = q.to(tl.int64), k.to(tl.int64)
    query += b * query_b + head * query_h
    key += b * key_b + head * kv_heads // heads * key_h
    queries = load_rows(query, q_row * query_q, q_exist, HEAD_DIM, BLOCK_D, True)
    keys = load_rows(key, k_row * key_k, k_exist, HEAD_DIM, BLOCK_D, True)
    s, bent = logits(product(queries, tl.trans(keys), None), factor, softcap, SOFTCAP)
    exist = q_exist[:, None] & k_exist[None, :]
    if BIAS != NO_BIAS:
        bias += b * bias_b + head * bias_heads // heads * bias_h
        s += to_base_2(tl.load(bias + (q_row * bias_q)[:, None] + (k_row * bias_k)[None, :], mask=exist, other=0.0))
    ends = load_ends(end + b * end_b + head * end_heads // heads * key_len, k, k_exist, HAS_END)
    visible = is_visible(
        q[:, None], k[None, :], ends[None, :], k_exist[None, :], 0, query, query_len, key_len, CAUSAL, HAS_END, 0,
    )  # fmt: skip
    if HAS_MASK:
        mask += b * mask_b + head * mask_heads // heads * mask_h
        visible &= tl.load(mask + (q_row * mask_q)[:, None] + (k_row * mask_k)[None, :], mask=exist, other=0) != 0
    return tl.where(visible & q_exist[:, None], s, float("-inf")), bent, exist


@triton.jit(do_not_specialize=RUN_TIME)
def _probabilities(
    query, key, bias, mask, end, lse, probs, query_b, query_q, query_h, key_b, key_k, key_h,
    bias_b, bias_h, bias_q, bias_k, mask_b, mask_h, mask_q, mask_k, end_b, batch,
    heads, kv_heads, bias_heads, mask_heads, end_heads, query_len, key_len, factor, softcap,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr, HAS_END: tl.constexpr,
    HAS_MASK: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    q, k, plane = _place(query_len, key_len, BLOCK_M, BLOCK_N)
    head = (plane % heads).to(tl.int64)
    b = (plane // heads).to(tl.int64)
    s, _, exist = _logits_of(
        b, head, q, k, query, key, bias, mask, end, query_b, query_q, query_h, key_b, key_k, key_h,
        bias_b, bias_h, bias_q, bias_k, mask_b, mask_h, mask_q, mask_k, end_b,
        heads, kv_heads, bias_heads, mask_heads, end_heads, query_len, key_len, factor, softcap,
        HEAD_DIM, BLOCK_D, CAUSAL, HAS_END, HAS_MASK, BIAS, SOFTCAP,
    )  # fmt: skip
    row = (b * heads + head) * query_len + q
    row_lse = tl.load(lse + row, mask=q < query_len, other=0.0)
    # A row that sees nothing has only logits of -inf.
    base = to_base_2(tl.where(row_lse == float("-inf"), 0.0, row_lse))
    p = probability(s, base[:, None])
    tl.store(probs + (row * key_len)[:, None] + k[None, :], p.to(probs.dtype.element_ty), mask=exist)


@triton.jit(do_not_specialize=RUN_TIME)
def _bias_gradient(
    query, key, value, bias, mask, end, lse, delta, grad_out, grad_bias,
    query_b, query_q, query_h, key_b, key_k, key_h, value_b, value_k, value_h, grad_out_b, grad_out_q, grad_out_h,
    bias_b, bias_h, bias_q, bias_k, mask_b, mask_h, mask_q, mask_k, end_b, batch, bias_batch,
    heads, kv_heads, bias_heads, mask_heads, end_heads, query_len, key_len, factor, softcap,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr, HAS_END: tl.constexpr,
    HAS_MASK: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    q, k, plane = _place(query_len, key_len, BLOCK_M, BLOCK_N)
    bias_head = (plane % bias_heads).to(tl.int64)
    bias_row = plane // bias_heads
    heads_each = heads // bias_heads
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    # Over the batches and heads that have this bias, always in the same order.
    for i in range(batch // bias_batch * heads_each):
        head = bias_head * heads_each + i % heads_each
        b = (bias_row + i // heads_each).to(tl.int64)
        s, _, exist = _logits_of(
            b, head, q, k, query, key, bias, mask, end, query_b, query_q, query_h, key_b, key_k, key_h,
            bias_b, bias_h, bias_q, bias_k, mask_b, mask_h, mask_q, mask_k, end_b,
            heads, kv_heads, bias_heads, mask_heads, end_heads, query_len, key_len, factor, softcap,
            HEAD_DIM, BLOCK_D, CAUSAL, HAS_END, HAS_MASK, BIAS, SOFTCAP,
        )  # fmt: skip
        row = (b * heads + head) * query_len + q
        p = probability(s, tl.load(lse + row, mask=q < query_len, other=float("inf"))[:, None])
        grads = load_rows(
            grad_out + b * grad_out_b + head * grad_out_h, q.to(tl.int64) * grad_out_q, q < query_len,
            HEAD_DIM, BLOCK_D, True,
        )  # fmt: skip
        values = load_rows(
            value + b * value_b + head * kv_heads // heads * value_h, k.to(tl.int64) * value_k, k < key_len,
            HEAD_DIM, BLOCK_D, True,
        )  # fmt: skip
        grad_p = product(grads, tl.trans(values), None)
        acc += p * (grad_p - tl.load(delta + row, mask=q < query_len, other=0.0)[:, None])
    rows = (bias_row.to(tl.int64) * bias_heads + bias_head) * query_len + q
    exist = (q < query_len)[:, None] & (k < key_len)[None, :]
    tl.store(grad_bias + (rows * key_len)[:, None] + k[None, :], acc.to(grad_bias.dtype.element_ty), mask=exist)
