"""The backward pass: two kernels, each over the pairs that it needs.

One has tiles of rows and the forward pass's lists, and makes the gradient of the queries. The other has tiles of the
keys of a run's list, goes over the run's rows, and makes the gradients of keys, values and a bias per key. Where one
run is not all there is, it adds to float32 sums; if these have to be the same on every run of the program, in turn.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...problem import Problem
from . import pairs, plan
from .forward import multiprocessors, prune_tiles_of_keys, tile_rows
from .tiles import (
    KEY_BIAS,
    PAIR_BIAS,
    count_keys,
    is_visible,
    load_ends,
    load_entries,
    load_rows,
    logits,
    probability,
    product,
    store_rows,
    to_base_2,
)  # fmt: skip
from .tuning import config, length_bucket, tuned

RUN_ROWS, LEAST_RUN_ROWS = 2048, 256  # of a run; fewer where there would be too few programs


def backward(
    problem: Problem, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None, needs_bias_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The gradients of query, key, value and bias, each in the shape and dtype of what it belongs to."""
    query, key, value, _, bias, *_ = problem
    layout = plan.make_layout(problem)
    if out.numel() == 0 or layout.key_len == 0:
        grads = [torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value)]
        return grads[0], grads[1], grads[2], torch.zeros_like(bias) if bias is not None and needs_bias_grad else None
    if grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()
    lse_2, delta = _prepare(layout, out, lse, grad_out, grad_lse)
    mask = plan.make_mask(problem, layout)
    shared = {
        "grad_out": grad_out,
        "grad_out_b": grad_out.stride(0),
        "grad_out_q": grad_out.stride(1),
        "grad_out_h": grad_out.stride(2),
        "lse": lse_2,
        "delta": delta,
    }
    grad_query = _query_gradient(problem, layout, mask, shared)
    grad_key, grad_value, grad_key_bias = _key_gradients(problem, layout, mask, shared, needs_bias_grad)

    grad_bias = None
    if bias is not None and needs_bias_grad:
        if grad_key_bias is not None:
            grad_bias = _sum_to(grad_key_bias, bias)
        elif bias.size(3) == 1 < layout.key_len:
            # All of a row's logits move together, and nothing but its lse with them.
            moved = delta.new_zeros(delta.shape) if grad_lse is None else grad_lse
            grad_bias = _sum_to(moved.masked_fill(lse == -torch.inf, 0)[..., None], bias)
        else:
            grad_bias = pairs.bias_gradient(problem, lse_2, delta, grad_out)
    return grad_query, grad_key, grad_value, grad_bias


def _sum_to(grad: Tensor, bias: Tensor) -> Tensor:
    """(B, units | H, 1 | Q, 1 | K) float32, summed over what the bias was broadcast over."""
    if bias.size(1) < grad.size(1):
        grad = grad.unflatten(1, (bias.size(1), -1)).sum(2)
    return grad.sum_to_size(bias.shape).to(bias.dtype)


def _prepare(
    layout: plan.Layout, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None
) -> tuple[Tensor, Tensor]:
    """lse in base 2, inf for rows that see nothing; sum(out · dOut) - dLse. Both (B, H, Q) float32."""
    lse_2, delta = torch.empty_like(lse), torch.empty_like(lse)
    rows = layout.batch * layout.query_len * layout.heads
    block = 16
    _prepare_rows[(triton.cdiv(rows, block),)](
        out, lse, grad_out, lse if grad_lse is None else grad_lse.contiguous(), lse_2, delta,
        grad_out.stride(0), grad_out.stride(1), grad_out.stride(2), rows, layout.query_len, layout.heads,
        HEAD_DIM=layout.head_dim, BLOCK_D=plan.block_d(layout), HAS_GRAD_LSE=grad_lse is not None, BLOCK=block,
    )  # fmt: skip
    return lse_2, delta


@triton.jit(do_not_specialize=["rows", "query_len", "heads"])
def _prepare_rows(
    out, lse, grad_out, grad_lse, lse_2, delta, grad_out_b, grad_out_q, grad_out_h, rows, query_len, heads,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HAS_GRAD_LSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    exist = row < rows
    head = row % heads
    q = row // heads % query_len
    b = row // heads // query_len
    outs = load_rows(out, row * HEAD_DIM, exist, HEAD_DIM, BLOCK_D, True)
    grads = load_rows(grad_out, b * grad_out_b + q * grad_out_q + head * grad_out_h, exist, HEAD_DIM, BLOCK_D, True)
    sums = tl.sum(outs.to(tl.float32) * grads.to(tl.float32), 1)
    at = (b * heads + head) * query_len + q
    if HAS_GRAD_LSE:
        sums -= tl.load(grad_lse + at, mask=exist, other=0.0).to(tl.float32)
    row_lse = tl.load(lse + at, mask=exist, other=0.0)
    tl.store(lse_2 + at, tl.where(row_lse == float("-inf"), float("inf"), to_base_2(row_lse)), mask=exist)
    tl.store(delta + at, sums, mask=exist)


def _query_gradient(problem: Problem, layout: plan.Layout, mask: plan.Mask, shared: dict[str, Any]) -> Tensor:
    grad_query = torch.empty(problem.query.shape, dtype=problem.query.dtype, device=problem.query.device)
    block_m = tile_rows(problem, layout)
    lists = plan.make_lists(mask, problem, layout, block_m)
    tiles = triton.cdiv(layout.rows, block_m)
    _query_kernel[(tiles * layout.batch * layout.units,)](
        **plan.kernel_arguments(problem, layout, mask, lists),
        **plan.key_bias_arguments(problem, layout, mask, lists),
        **shared,
        grad_query=grad_query,
        scale=problem.scale,
        tiles=tiles,
        bucket=length_bucket(layout.query_len, layout.key_len if lists is None else lists.capacity),
        BLOCK_M=block_m,
        WORDS=0 if mask.bits is None else plan.words_of(block_m, layout.group),
    )
    return grad_query


RUN_TIME = [
    "heads", "kv_heads", "units", "bias_heads", "mask_heads", "mask_b", "query_len", "key_len", "runs", "factor",
    "softcap", "scale", "tiles", "bucket", "keys_row", "run_rows", "capacity", "key_bias_unit",
    "key_bias_run",
]  # fmt: skip


@tuned(
    [
        config(8, 3, BLOCK_N=64),
        config(8, 2, BLOCK_N=64),
        config(8, 4, BLOCK_N=32),
        config(4, 2, BLOCK_N=64),
        config(4, 2, BLOCK_N=32),
        config(8, 2, BLOCK_N=32),
        config(8, 1, BLOCK_N=32),
        config(8, 2, registers=128, BLOCK_N=32),
        config(8, 4, registers=128, BLOCK_N=32),
    ],
    key=["bucket", "HEAD_DIM", "BLOCK_M", "GROUP", "CAUSAL", "HAS_END", "WORDS", "LISTED", "BIAS", "SOFTCAP"],
    prune=prune_tiles_of_keys,
)
@triton.jit(do_not_specialize=RUN_TIME)
def _query_kernel(
    query, key, value, bias, end, bits, keys, counts, key_bias, grad_out, lse, delta, grad_query,
    query_b, query_q, query_h, key_b, key_k, key_h, value_b, value_k, value_h, bias_b, bias_h, bias_q, bias_k,
    grad_out_b, grad_out_q, grad_out_h, heads, kv_heads, units, bias_heads, mask_heads, mask_b,
    query_len, key_len, runs, keys_row, keys_run, key_bias_unit, key_bias_run, factor, softcap, scale, tiles, bucket,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr, HAS_END: tl.constexpr,
    LISTED: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr, WORDS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    tile = tiles - 1 - tl.program_id(0) % tiles
    unit = (tl.program_id(0) // tiles % units).to(tl.int64)
    b = (tl.program_id(0) // tiles // units).to(tl.int64)
    mask_row = b * mask_b + unit * mask_heads // units
    kv_head = unit * kv_heads // units

    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    q_row = row // GROUP
    head = unit * GROUP + row % GROUP
    exist = q_row < query_len
    first_query = tile * BLOCK_M // GROUP
    last_query = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // GROUP, query_len - 1)
    q_long = q_row.to(tl.int64)
    queries = load_rows(query + b * query_b, q_long * query_q + head * query_h, exist, HEAD_DIM, BLOCK_D, True)
    grads = load_rows(
        grad_out + b * grad_out_b, q_long * grad_out_q + head * grad_out_h, exist, HEAD_DIM, BLOCK_D, True
    )
    at = (b * heads + head) * query_len + q_row
    row_lse = tl.load(lse + at, mask=exist, other=float("inf"))
    row_delta = tl.load(delta + at, mask=exist, other=0.0)

    full, total = count_keys(
        counts + mask_row * runs * 2, tile, first_query, last_query, query_len, key_len, CAUSAL, LISTED
    )
    tested = full // BLOCK_N * BLOCK_N
    key += b * key_b + kv_head * key_h
    value += b * value_b + kv_head * value_h
    keys += mask_row * keys_row + tile.to(tl.int64) * keys_run
    bits += mask_row * tl.cdiv(query_len, 32) * key_len
    end += mask_row * key_len
    bias += b * bias_b
    key_bias += (b * units + unit) * key_bias_unit + tile.to(tl.int64) * key_bias_run
    bias_rows = q_long * bias_q + (head * bias_heads // heads) * bias_h

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    acc = _over_keys(
        acc, queries, grads, row_lse, row_delta, key, value, bias, end, bits, keys, key_bias, 0, tested, total,
        q_row, bias_rows, first_query // 32, query_len, key_len, key_k, value_k, bias_k, factor, softcap, exist,
        HEAD_DIM, BLOCK_D, CAUSAL, HAS_END, LISTED, BIAS, SOFTCAP, WORDS, BLOCK_N, False,
    )  # fmt: skip
    acc = _over_keys(
        acc, queries, grads, row_lse, row_delta, key, value, bias, end, bits, keys, key_bias, tested, total, total,
        q_row, bias_rows, first_query // 32, query_len, key_len, key_k, value_k, bias_k, factor, softcap, exist,
        HEAD_DIM, BLOCK_D, CAUSAL, HAS_END, LISTED, BIAS, SOFTCAP, WORDS, BLOCK_N, True,
    )  # fmt: skip
    out_rows = (b * query_len + q_row) * heads + head
    store_rows(grad_query, out_rows * HEAD_DIM, exist, acc * scale, HEAD_DIM, BLOCK_D)


@triton.jit
def _over_keys(
    acc, queries, grads, row_lse, row_delta, key, value, bias, end, bits, keys, key_bias, first, last, total,
    q_row, bias_rows, first_word, query_len, key_len, key_k, value_k, bias_k, factor, softcap, exist,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr, HAS_END: tl.constexpr, LISTED: tl.constexpr,
    BIAS: tl.constexpr, SOFTCAP: tl.constexpr, WORDS: tl.constexpr, BLOCK_N: tl.constexpr, TESTED: tl.constexpr,
):  # fmt: skip
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
        s, bent = logits(product(queries, tl.trans(key_tile), None), factor, softcap, SOFTCAP)
        if BIAS == KEY_BIAS:
            s += load_entries(key_bias, entry, listed, TESTED)[None, :]
        if BIAS == PAIR_BIAS:
            places = bias_rows[:, None] + (k_row * bias_k)[None, :]
            s += to_base_2(tl.load(bias + places, mask=exist[:, None] & listed[None, :], other=0.0))
        if TESTED:
            visible = is_visible(
                q_row[:, None], k[None, :], ends[None, :], listed[None, :], first_word, bits, query_len, key_len,
                CAUSAL, HAS_END, WORDS,
            )  # fmt: skip
            s = tl.where(visible, s, float("-inf"))
        p = probability(s, row_lse[:, None])
        grad_p = product(grads, tl.trans(value_tile), None)
        grad_s = p * (grad_p - row_delta[:, None])
        if SOFTCAP:
            grad_s *= 1 - bent * bent
        acc = product(grad_s.to(key_tile.dtype), key_tile, acc)
    return acc


def _key_gradients(
    problem: Problem, layout: plan.Layout, mask: plan.Mask, shared: dict[str, Any], needs_bias_grad: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of keys, values and a bias per key, the last (B, units, 1, K) float32."""
    key = problem.key
    run_rows = _run_rows(layout, mask, multiprocessors(key.device))
    lists = plan.make_lists(mask, problem, layout, run_rows)
    runs = triton.cdiv(layout.rows, run_rows)
    capacity = layout.key_len if lists is None else lists.capacity
    adds = runs > 1 or layout.units > layout.kv_heads
    in_turn = adds and problem.deterministic
    # What the kernel does not write has no gradient.
    make = torch.zeros if adds or lists is not None else torch.empty
    grad_key, grad_value = (
        make(key.shape, dtype=torch.float32 if adds else key.dtype, device=key.device) for _ in range(2)
    )
    turns = torch.zeros((layout.batch, layout.kv_heads), dtype=torch.int32, device=key.device)
    grad_bias = None
    if plan.bias_kind(problem.bias) == KEY_BIAS.value and needs_bias_grad:
        grad_bias = make((layout.batch, layout.units, 1, layout.key_len), dtype=torch.float32, device=key.device)

    def grid(meta: dict[str, int]) -> tuple[int]:
        return (triton.cdiv(capacity, meta["BLOCK_N"]) * runs * layout.batch * layout.units,)

    _key_kernel[grid](
        **plan.kernel_arguments(problem, layout, mask, lists) | {"runs": runs},
        **shared,
        grad_key=grad_key,
        grad_value=grad_value,
        grad_bias=turns if grad_bias is None else grad_bias,
        turns=turns,
        scale=problem.scale,
        run_rows=run_rows,
        capacity=capacity,
        bucket=length_bucket(layout.query_len, capacity),
        HAS_BITS=mask.bits is not None,
        GRAD_BIAS=grad_bias is not None,
        ADDS=adds,
        IN_TURN=in_turn,
    )
    return grad_key.to(key.dtype), grad_value.to(key.dtype), grad_bias


def _prune_tiles(configs: list[triton.Config], arguments: dict[str, Any]) -> list[triton.Config]:
    """Two tiles of keys and those of rows, twice, are in shared memory; two float32 sums of a tile in registers."""
    bytes_of_row = arguments["query"].element_size() * arguments["BLOCK_D"]
    most, least = (128, 64) if bytes_of_row <= 256 else (64, 32) if bytes_of_row <= 512 else (32, 32)
    fitting = [c for c in configs if least <= c.kwargs["BLOCK_N"] <= most]
    return [c for c in fitting if c.kwargs["BLOCK_M"] == 32 and c.num_stages <= 2] if bytes_of_row > 256 else fitting


def _run_rows(layout: plan.Layout, mask: plan.Mask, multiprocessors: int) -> int:
    """Where all queries have one list, a run is all of them. But there should be enough programs in any case."""
    one_list = mask.survivors is None and mask.bits is None
    keys = layout.key_len if mask.survivors is None else min(layout.key_len, mask.survivors.size(3))
    programs = layout.batch * layout.units * triton.cdiv(keys, 128)  # of a run
    enough = triton.cdiv(2 * multiprocessors, programs)
    rows = triton.cdiv(layout.rows, enough)
    return max(LEAST_RUN_ROWS, triton.next_power_of_2(rows if one_list else min(rows, RUN_ROWS)))


@tuned(
    [
        config(8, 3, BLOCK_M=64, BLOCK_N=128),
        config(8, 2, BLOCK_M=64, BLOCK_N=128),
        config(8, 4, BLOCK_M=32, BLOCK_N=128),
        config(4, 2, BLOCK_M=64, BLOCK_N=64),
        config(4, 3, BLOCK_M=32, BLOCK_N=64),
        config(8, 2, BLOCK_M=32, BLOCK_N=64),
        config(4, 2, BLOCK_M=32, BLOCK_N=32),
        config(8, 1, BLOCK_M=32, BLOCK_N=32),
    ],
    key=[
        "bucket", "HEAD_DIM", "GROUP", "CAUSAL", "HAS_END", "HAS_BITS", "LISTED", "BIAS", "SOFTCAP", "GRAD_BIAS",
        "ADDS", "IN_TURN",
    ],
    reset=["grad_key", "grad_value", "grad_bias", "turns"],
    prune=_prune_tiles,
)  # fmt: skip
@triton.jit(do_not_specialize=RUN_TIME)
def _key_kernel(
    query, key, value, bias, end, bits, keys, counts, grad_out, lse, delta, grad_key, grad_value, grad_bias, turns,
    query_b, query_q, query_h, key_b, key_k, key_h, value_b, value_k, value_h, bias_b, bias_h, bias_q, bias_k,
    grad_out_b, grad_out_q, grad_out_h, heads, kv_heads, units, bias_heads, mask_heads, mask_b,
    query_len, key_len, runs, keys_row, keys_run, factor, softcap, scale, run_rows, capacity, bucket,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr, HAS_END: tl.constexpr,
    LISTED: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr, HAS_BITS: tl.constexpr,
    GRAD_BIAS: tl.constexpr, ADDS: tl.constexpr, IN_TURN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # Programs that wait for others' turns start after those: the tiles of a run are neighbours, and runs in order.
    tiles = tl.cdiv(capacity, BLOCK_N)
    tile = tl.program_id(0) % tiles
    run = tl.program_id(0) // tiles % runs
    unit = (tl.program_id(0) // tiles // runs % units).to(tl.int64)
    b = (tl.program_id(0) // tiles // runs // units).to(tl.int64)
    mask_row = b * mask_b + unit * mask_heads // units
    kv_head = unit * kv_heads // units

    shift = key_len - query_len
    first_row = run * run_rows
    stop_row = tl.minimum(first_row + run_rows, query_len * GROUP)
    full, total = count_keys(
        counts + mask_row * runs * 2, run, first_row // GROUP, (stop_row - 1) // GROUP, query_len, key_len,
        CAUSAL, LISTED,
    )  # fmt: skip
    entry = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    listed = entry < total
    if LISTED:
        k = tl.load(keys + mask_row * keys_row + run.to(tl.int64) * keys_run + entry, mask=listed, other=0)
    else:
        k = tl.where(listed, entry, 0)
    k_row = k.to(tl.int64)
    bits += mask_row * tl.cdiv(query_len, 32) * key_len
    end += mask_row * key_len

    # The tile's rows: from `first` on there is something to see, and from `tested` on nothing to test.
    first = first_row
    last = stop_row
    tested = first_row
    if CAUSAL:
        oldest = tl.min(tl.where(listed, k, key_len), 0) - shift
        newest = tl.max(tl.where(listed, k, 0), 0) - shift
        first = tl.maximum(first, oldest * GROUP // BLOCK_M * BLOCK_M)
        tested = tl.maximum(first, tl.cdiv(tl.maximum(newest, 0) * GROUP, BLOCK_M) * BLOCK_M)
    ends = load_ends(end, k, listed, HAS_END)
    if HAS_END:
        last = tl.minimum(last, tl.maximum(tl.max(ends, 0) - shift, 0) * GROUP)
    if HAS_END or HAS_BITS:
        tested = last
    if (tile + 1) * BLOCK_N <= full:
        tested = first
    first = tl.minimum(first, last)
    tested = tl.minimum(tested, last)
    if tile * BLOCK_N >= total:
        first = last
        tested = last

    key_tile = load_rows(key + b * key_b + kv_head * key_h, k_row * key_k, listed, HEAD_DIM, BLOCK_D, True)
    value_tile = load_rows(value + b * value_b + kv_head * value_h, k_row * value_k, listed, HEAD_DIM, BLOCK_D, True)
    query += b * query_b + unit * GROUP * query_h
    grad_out += b * grad_out_b + unit * GROUP * grad_out_h
    lse += (b * heads + unit * GROUP) * query_len
    delta += (b * heads + unit * GROUP) * query_len
    bias += b * bias_b
    key_bias = tl.zeros([BLOCK_N], tl.float32)
    if BIAS == KEY_BIAS:
        bias += (unit * bias_heads // units) * bias_h
        key_bias = to_base_2(tl.load(bias + k_row * bias_k, mask=listed, other=0.0))

    key_sums = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    value_sums = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    bias_sums = tl.zeros([BLOCK_N], tl.float32)
    key_sums, value_sums, bias_sums = _over_rows(
        key_sums, value_sums, bias_sums, key_tile, value_tile, key_bias, k, ends, listed, first, tested,
        query, grad_out, lse, delta, bias, bits, query_q, query_h, grad_out_q, grad_out_h, bias_h, bias_q, bias_k,
        unit, heads, bias_heads, query_len, key_len, factor, softcap,
        HEAD_DIM, BLOCK_D, GROUP, CAUSAL, HAS_END, BIAS, SOFTCAP, HAS_BITS, GRAD_BIAS, BLOCK_M, True,
    )  # fmt: skip
    key_sums, value_sums, bias_sums = _over_rows(
        key_sums, value_sums, bias_sums, key_tile, value_tile, key_bias, k, ends, listed, tested, last,
        query, grad_out, lse, delta, bias, bits, query_q, query_h, grad_out_q, grad_out_h, bias_h, bias_q, bias_k,
        unit, heads, bias_heads, query_len, key_len, factor, softcap,
        HEAD_DIM, BLOCK_D, GROUP, CAUSAL, HAS_END, BIAS, SOFTCAP, HAS_BITS, GRAD_BIAS, BLOCK_M, False,
    )  # fmt: skip
    key_sums *= scale

    out_rows = ((b * key_len + k_row) * kv_heads + kv_head) * HEAD_DIM
    bias_place = grad_bias + (b * units + unit) * key_len + k
    if ADDS:
        dim = tl.arange(0, BLOCK_D)
        places = out_rows[:, None] + dim[None, :]
        exist = listed[:, None] & (dim < HEAD_DIM)[None, :]
        if IN_TURN:
            # After all tiles of earlier runs of this unit, and of earlier units of its KV head.
            turn = turns + b * kv_heads + kv_head
            before = ((unit - kv_head * (units // kv_heads)) * runs + run) * tiles
            while tl.atomic_add(turn, 0, sem="acquire") < before:
                pass
        tl.atomic_add(grad_key + places, key_sums, mask=exist, sem="relaxed")
        tl.atomic_add(grad_value + places, value_sums, mask=exist, sem="relaxed")
        if GRAD_BIAS:
            tl.atomic_add(bias_place, bias_sums, mask=listed, sem="relaxed")
        if IN_TURN:
            tl.debug_barrier()
            tl.atomic_add(turn, 1, sem="release")
    else:
        store_rows(grad_key, out_rows, listed, key_sums, HEAD_DIM, BLOCK_D)
        store_rows(grad_value, out_rows, listed, value_sums, HEAD_DIM, BLOCK_D)
        if GRAD_BIAS:
            tl.store(bias_place, bias_sums, mask=listed)


@triton.jit
def _over_rows(
    key_sums, value_sums, bias_sums, key_tile, value_tile, key_bias, k, ends, listed, first, last,
    query, grad_out, lse, delta, bias, bits, query_q, query_h, grad_out_q, grad_out_h, bias_h, bias_q, bias_k,
    unit, heads, bias_heads, query_len, key_len, factor, softcap,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr, HAS_END: tl.constexpr,
    BIAS: tl.constexpr, SOFTCAP: tl.constexpr, HAS_BITS: tl.constexpr, GRAD_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, TESTED: tl.constexpr,
):  # fmt: skip
    """The rows first to last, BLOCK_M at a time. Scores are keys × rows.

    Rows of the tile that are no row have an lse of inf, so a probability of 0. Keys that are none stay by themselves.
    """
    # Rows within a tile are near each other, and their offsets small; a tile's own can be large.
    local = tl.arange(0, BLOCK_M)
    for start in range(first, last, BLOCK_M):
        first_q = start // GROUP
        offset = 0 if BLOCK_M % GROUP == 0 else start - first_q * GROUP
        near = (offset + local) // GROUP
        q = first_q + near
        g = (offset + local) % GROUP
        exist = q < query_len
        tile_queries = query + tl.cast(first_q, tl.int64) * query_q
        queries = load_rows(tile_queries, near * query_q + g.to(tl.int64) * query_h, exist, HEAD_DIM, BLOCK_D, True)
        row_lse = tl.load(lse + g * query_len + q, mask=exist, other=float("inf"))
        s, bent = logits(product(key_tile, tl.trans(queries), None), factor, softcap, SOFTCAP)
        if BIAS == KEY_BIAS:
            s += key_bias[:, None]
        if BIAS == PAIR_BIAS:
            head = (unit * GROUP + g) * bias_heads // heads
            places = (q.to(tl.int64) * bias_q + head * bias_h)[None, :] + (k.to(tl.int64) * bias_k)[:, None]
            s += to_base_2(tl.load(bias + places, mask=exist[None, :] & listed[:, None], other=0.0))
        if TESTED:
            WORDS: tl.constexpr = (
                0 if not HAS_BITS
                else BLOCK_M // GROUP // 32 if BLOCK_M % GROUP == 0 and BLOCK_M // GROUP % 32 == 0
                else ((BLOCK_M - 2) // GROUP + 32) // 32 + 1
            )  # fmt: skip
            visible = is_visible(
                q[None, :], k[:, None], ends[:, None], listed[:, None], start // GROUP // 32, bits, query_len, key_len,
                CAUSAL, HAS_END, WORDS,
            )  # fmt: skip
            s = tl.where(visible, s, float("-inf"))
        p = probability(s, row_lse[None, :])
        tile_grads = grad_out + tl.cast(first_q, tl.int64) * grad_out_q
        grads = load_rows(tile_grads, near * grad_out_q + g.to(tl.int64) * grad_out_h, exist, HEAD_DIM, BLOCK_D, True)
        value_sums = product(p.to(grads.dtype), grads, value_sums)
        row_delta = tl.load(delta + g * query_len + q, mask=exist, other=0.0)
        grad_p = product(value_tile, tl.trans(grads), None)
        grad_s = p * (grad_p - row_delta[None, :])
        if GRAD_BIAS:
            bias_sums += tl.sum(grad_s, 1)
        if SOFTCAP:
            grad_s *= 1 - bent * bent
        key_sums = product(grad_s.to(queries.dtype), queries, key_sums)
    return key_sums, value_sums, bias_sums
