"""The forward pass: a program has a tile of rows and goes over their keys. With few rows several share the keys."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...problem import Problem
from . import plan
from .tiles import (
    KEY_BIAS,
    LN_2,
    PAIR_BIAS,
    count_keys,
    is_visible,
    load_ends,
    load_entries,
    load_rows,
    logits,
    product,
    store_rows,
    to_base_2,
)  # fmt: skip
from .tuning import config, length_bucket, tuned

KEYS_PER_SPLIT = 128  # at least


def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    """out (B, Q, H, D) and lse (B, H, Q) float32."""
    layout = plan.make_layout(problem)
    batch, query_len, key_len, heads = layout[:4]
    out = problem.query.new_empty(problem.query.shape)
    lse = out.new_empty((batch, heads, query_len), dtype=torch.float32)
    if out.numel() == 0 or key_len == 0:
        return out.zero_(), lse.fill_(-torch.inf)

    block_m = tile_rows(problem, layout)
    mask = plan.make_mask(problem, layout)
    lists = plan.make_lists(mask, problem, layout, block_m)
    tiles = triton.cdiv(layout.rows, block_m)
    splits = _splits(batch * layout.units * tiles, key_len if lists is None else lists.capacity, out.device)
    partial_out, partial_lse = out, lse
    if splits > 1:
        partial_out = out.new_empty((splits, *out.shape), dtype=torch.float32)
        partial_lse = lse.new_empty((2, splits, *lse.shape))  # its two parts: what exponents refer to, and their sum
    hidden_strides = plan.broadcast_strides(mask.hidden)
    _forward[(tiles * batch * layout.units * splits,)](
        **plan.kernel_arguments(problem, layout, mask, lists),
        **plan.key_bias_arguments(problem, layout, mask, lists),
        hidden=out if mask.hidden is None else mask.hidden.view(torch.uint8),
        hidden_b=hidden_strides[0],
        hidden_h=hidden_strides[1],
        hidden_q=hidden_strides[2],
        hidden_heads=1 if mask.hidden is None else mask.hidden.size(1),
        out=partial_out,
        lse=partial_lse,
        tiles=tiles,
        batch=batch,
        splits=splits,
        bucket=length_bucket(query_len, key_len if lists is None else lists.capacity),
        BLOCK_M=block_m,
        WORDS=0 if mask.bits is None else plan.words_of(block_m, layout.group),
        HIDDEN=mask.hidden is not None,
        SPLIT=splits > 1,
    )
    if splits > 1:
        rows = batch * query_len * heads
        _combine[(rows,)](
            partial_out, partial_lse, out, lse, rows, query_len, heads, splits, layout.head_dim,
            BLOCK_D=triton.next_power_of_2(layout.head_dim), BLOCK_S=triton.next_power_of_2(splits),
        )  # fmt: skip
    return out, lse


def tile_rows(problem: Problem, layout: plan.Layout) -> int:
    """Rows of a tile: what registers hold of the results, and no more than there are."""
    bytes_of_row = problem.query.element_size() * plan.block_d(layout)
    most = 128 if bytes_of_row <= 256 else 64 if bytes_of_row <= 512 else 32
    if shared_memory(problem.query.device) < 128 << 10 and bytes_of_row > 256:
        most = most // 2
    return max(16, min(most, triton.next_power_of_2(layout.rows)))


@functools.cache
def multiprocessors(device: torch.device) -> int:
    if device.type == "cpu":
        return 8  # interpreted
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes that a program can have."""
    if device.type == "cpu":
        return 128 << 10  # interpreted
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 128 << 10)


def _splits(programs: int, keys: int, device: torch.device) -> int:
    """How many programs share the keys of a tile: enough for all multiprocessors, where there are keys enough."""
    wanted = 2 * multiprocessors(device) // programs
    return max(1, min(wanted, triton.cdiv(keys, KEYS_PER_SPLIT), 128))


def prune_tiles_of_keys(configs: list[triton.Config], arguments: dict[str, Any]) -> list[triton.Config]:
    """Tiles that fit into shared memory, and as many warps as rows and registers ask for."""
    is_float32, block_d = arguments["query"].element_size() == 4, arguments["BLOCK_D"]
    if is_float32 or block_d > 128:
        configs = [c for c in configs if c.maxnreg is None]
    if is_float32:
        return [c for c in configs if c.kwargs["BLOCK_N"] == 32 and c.num_stages <= 2]
    if block_d > 128:
        return [c for c in configs if c.kwargs["BLOCK_N"] <= 64 and c.num_stages <= 3]
    warps = 8 if arguments["BLOCK_M"] >= 128 else 4
    return [c for c in configs if c.num_warps == warps]


@tuned(
    [
        config(8, 3, BLOCK_N=64),
        config(8, 5, BLOCK_N=64),
        config(8, 4, registers=128, BLOCK_N=32),
        config(8, 6, registers=128, BLOCK_N=32),
        config(8, 4, BLOCK_N=32),
        config(4, 2, BLOCK_N=128),
        config(4, 3, BLOCK_N=64),
        config(4, 2, BLOCK_N=32),
        config(8, 2, BLOCK_N=32),
    ],
    key=[
        "bucket", "HEAD_DIM", "BLOCK_M", "GROUP", "CAUSAL", "HAS_END", "WORDS", "LISTED", "BIAS", "SOFTCAP", "SPLIT",
    ],
    prune=prune_tiles_of_keys,
)  # fmt: skip
@triton.jit(
    do_not_specialize=[
        "heads", "kv_heads", "units", "bias_heads", "mask_heads", "mask_b", "hidden_heads", "query_len", "key_len",
        "runs", "factor", "softcap", "tiles", "batch", "splits", "bucket", "keys_row", "key_bias_unit", "key_bias_run",
    ]
)  # fmt: skip
def _forward(
    query, key, value, bias, end, bits, keys, counts, key_bias, hidden, out, lse,
    query_b, query_q, query_h, key_b, key_k, key_h, value_b, value_k, value_h, bias_b, bias_h, bias_q, bias_k,
    hidden_b, hidden_h, hidden_q, heads, kv_heads, units, bias_heads, mask_heads, mask_b, hidden_heads,
    query_len, key_len, runs, keys_row, keys_run, key_bias_unit, key_bias_run, factor, softcap, tiles, batch, splits,
    bucket,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr, HAS_END: tl.constexpr,
    LISTED: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr, HIDDEN: tl.constexpr, SPLIT: tl.constexpr,
    WORDS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(0) % splits
    tile = tiles - 1 - tl.program_id(0) // splits % tiles  # the last tiles, which see the most keys, first
    unit = (tl.program_id(0) // splits // tiles % units).to(tl.int64)
    b = (tl.program_id(0) // splits // tiles // units).to(tl.int64)
    mask_row = b * mask_b + unit * mask_heads // units
    kv_head = unit * kv_heads // units

    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    q_row = row // GROUP
    head = unit * GROUP + row % GROUP
    exist = q_row < query_len
    first_query = tile * BLOCK_M // GROUP
    last_query = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // GROUP, query_len - 1)
    rows = q_row.to(tl.int64) * query_q + head * query_h
    queries = load_rows(query + b * query_b, rows, exist, HEAD_DIM, BLOCK_D, True)

    full, total = count_keys(
        counts + mask_row * runs * 2, tile, first_query, last_query, query_len, key_len, CAUSAL, LISTED
    )
    steps = tl.cdiv(total, BLOCK_N)
    first_step = steps * split // splits
    last_step = steps * (split + 1) // splits
    # The tiles before this step need no test.
    tested = tl.minimum(tl.maximum(full // BLOCK_N, first_step), last_step)
    key += b * key_b + kv_head * key_h
    value += b * value_b + kv_head * value_h
    keys += mask_row * keys_row + tile.to(tl.int64) * keys_run
    bits += mask_row * tl.cdiv(query_len, 32) * key_len
    end += mask_row * key_len
    bias += b * bias_b
    key_bias += (b * units + unit) * key_bias_unit + tile.to(tl.int64) * key_bias_run
    bias_rows = q_row.to(tl.int64) * bias_q + (head * bias_heads // heads) * bias_h

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    weight = tl.zeros([BLOCK_M], tl.float32)
    base = tl.full([BLOCK_M], float("-inf"), tl.float32)
    acc, weight, base = _attend(
        acc, weight, base, queries, key, value, bias, end, bits, keys, key_bias, first_step * BLOCK_N,
        tested * BLOCK_N, total, q_row, bias_rows, first_query // 32, query_len, key_len, key_k, value_k, bias_k,
        factor, softcap, exist,
        HEAD_DIM, BLOCK_D, CAUSAL, HAS_END, LISTED, BIAS, SOFTCAP, WORDS, BLOCK_N, False,
    )  # fmt: skip
    acc, weight, base = _attend(
        acc, weight, base, queries, key, value, bias, end, bits, keys, key_bias, tested * BLOCK_N,
        last_step * BLOCK_N, total, q_row, bias_rows, first_query // 32, query_len, key_len, key_k, value_k, bias_k,
        factor, softcap, exist,
        HEAD_DIM, BLOCK_D, CAUSAL, HAS_END, LISTED, BIAS, SOFTCAP, WORDS, BLOCK_N, True,
    )  # fmt: skip

    if HIDDEN:
        offsets = q_row.to(tl.int64) * hidden_q + (head * hidden_heads // heads) * hidden_h
        seen = tl.load(hidden + b * hidden_b + offsets, mask=exist, other=0)
        weight = tl.where(seen != 0, weight, 0.0)
    nothing = weight == 0
    acc = tl.where(nothing[:, None], 0.0, acc / tl.where(nothing, 1.0, weight)[:, None])
    if SPLIT:
        b += split.to(tl.int64) * batch
    out_rows = (b * query_len + q_row) * heads + head
    store_rows(out, out_rows * HEAD_DIM, exist, acc, HEAD_DIM, BLOCK_D)
    lse_rows = (b * heads + head) * query_len + q_row
    if SPLIT:
        tl.store(lse + lse_rows, tl.where(nothing, float("-inf"), base), mask=exist)
        tl.store(lse + splits.to(tl.int64) * batch * heads * query_len + lse_rows, weight, mask=exist)
    else:
        tl.store(lse + lse_rows, to_lse(base, weight), mask=exist)


@triton.jit
def _attend(
    acc, weight, base, queries, key, value, bias, end, bits, keys, key_bias, first, last, total,
    q_row, bias_rows, first_word, query_len, key_len, key_k, value_k, bias_k, factor, softcap, exist,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr, HAS_END: tl.constexpr, LISTED: tl.constexpr,
    BIAS: tl.constexpr, SOFTCAP: tl.constexpr, WORDS: tl.constexpr, BLOCK_N: tl.constexpr, TESTED: tl.constexpr,
):  # fmt: skip
    """The entries first to last of the list: tiles of BLOCK_N keys."""
    # Few tiles of a list have a test. They wait for what they load: were they pipelined, too, ptxas would let all
    # products of the kernel wait for each other.
    STAGES: tl.constexpr = 1 if TESTED and WORDS == 0 else None
    for start in tl.range(first, last, BLOCK_N, num_stages=STAGES):
        entry = start + tl.arange(0, BLOCK_N)
        listed = entry < total
        k = entry
        if LISTED:
            k = load_entries(keys, entry, listed, TESTED)
        k_row = k.to(tl.int64)
        ends = load_ends(end, k, listed, HAS_END and TESTED)
        key_tile = load_rows(key, k_row * key_k, listed, HEAD_DIM, BLOCK_D, TESTED)
        value_tile = load_rows(value, k_row * value_k, listed, HEAD_DIM, BLOCK_D, TESTED)
        products = product(queries, tl.trans(key_tile), None)
        s, _ = logits(products, factor, softcap, SOFTCAP)
        if BIAS == KEY_BIAS:
            s += load_entries(key_bias, entry, listed, TESTED)[None, :]
        if BIAS == PAIR_BIAS:
            pairs = bias_rows[:, None] + (k_row * bias_k)[None, :]
            s += to_base_2(tl.load(bias + pairs, mask=exist[:, None] & listed[None, :], other=0.0))
        if TESTED:
            visible = is_visible(
                q_row[:, None], k[None, :], ends[None, :], listed[None, :], first_word, bits, query_len, key_len,
                CAUSAL, HAS_END, WORDS,
            )  # fmt: skip
            s = tl.where(visible, s, float("-inf"))
        new_base = tl.maximum(base, tl.max(s, 1))
        finite = tl.where(new_base == float("-inf"), 0.0, new_base)
        p = tl.exp2(s - finite[:, None])
        shrink = tl.exp2(base - finite)
        weight = weight * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None]
        acc = product(p.to(value_tile.dtype), value_tile, acc)
        base = new_base
    return acc, weight, base


@triton.jit
def to_lse(base, weight):
    """The natural logarithm of weight 2^base; -inf where nothing has a weight."""
    nothing = weight == 0
    return tl.where(nothing, float("-inf"), (base + tl.log2(tl.where(nothing, 1.0, weight))) * LN_2)


@triton.jit(do_not_specialize=["rows", "query_len", "heads", "splits"])
def _combine(
    partial_out, partial_lse, out, lse, rows, query_len, heads, splits, head_dim,
    BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """A program puts the parts of one row together, always in the same order."""
    row = tl.program_id(0).to(tl.int64)  # (b, q, head)
    head = row % heads
    q = row // heads % query_len
    b = row // heads // query_len
    lse_row = (b * heads + head) * query_len + q
    split = tl.arange(0, BLOCK_S)
    dim = tl.arange(0, BLOCK_D)
    place = partial_lse + split.to(tl.int64) * rows + lse_row
    bases = tl.load(place, mask=split < splits, other=float("-inf"))
    weights = tl.load(place + splits.to(tl.int64) * rows, mask=split < splits, other=0.0)
    base = tl.max(bases, 0)
    share = weights * tl.exp2(bases - tl.where(base == float("-inf"), 0.0, base))
    weight = tl.sum(share, 0)
    exist = (split < splits)[:, None] & (dim < head_dim)[None, :]
    offsets = (split.to(tl.int64) * rows + row)[:, None] * head_dim + dim[None, :]
    acc = tl.sum(tl.load(partial_out + offsets, mask=exist, other=0.0) * share[:, None], 0)
    acc = acc / tl.where(weight == 0, 1.0, weight)
    tl.store(out + row * head_dim + dim, acc.to(out.dtype.element_ty), mask=dim < head_dim)
    tl.store(lse + lse_row, to_lse(base, weight))
