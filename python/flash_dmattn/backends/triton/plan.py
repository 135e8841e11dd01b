"""From a problem's mask to what kernels read: which keys a run of queries loads, and how pairs are tested.

Rows of a tile are (query, head) pairs: a unit is the query heads that share keys, mask and per-key bias, and row
`r` of a unit is query `r // group` of its head `r % group`. A run is a number of consecutive rows that have one list
of keys: in the forward pass a tile, in the backward pass more. A list's first keys are those that all queries of the
run see; they need no test. Nothing here waits for the device: how long a list can be follows from the shapes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import operators
from ...problem import Problem
from .tiles import KEY_BIAS, LOG2_E, NO_BIAS, PAIR_BIAS, to_base_2

BLOCK_CANDIDATES = 1024
BLOCK_PACKED = 128
BLOCK_BIAS = 512


class Layout(NamedTuple):
    """A problem's sizes, and how its heads make units."""

    batch: int
    query_len: int
    key_len: int
    heads: int
    kv_heads: int
    head_dim: int
    units: int  # of a batch
    group: int  # query heads of a unit

    @property
    def rows(self) -> int:
        """Of a unit."""
        return self.query_len * self.group

    @property
    def shift(self) -> int:
        """The position of the first query."""
        return self.key_len - self.query_len


class Mask(NamedTuple):
    """What a problem's mask becomes once, whatever the runs are.

    A row of it is a (batch, head); batch 1 and head 1 broadcast.
    """

    batch: int
    heads: int
    end: Tensor | None  # (batch, heads, K) int32
    survivors: Tensor | None  # (batch, heads, chunks, slots) int32
    keys: Tensor | None  # (batch, heads, K) int32: the visible keys of all queries, in rising order
    before: Tensor | None  # beside keys, (batch, heads, K + 1) int32: how many of them are before each key
    untested: Tensor | None  # beside keys, (batch, heads, 1) bool: whether causality is the only test
    bits: Tensor | None  # (batch, heads, ceil(Q / 32), K) int32: bit i of a word is its i-th query
    hidden: Tensor | None  # (batch, heads, Q, 1) bool: queries that see something

    @property
    def batch_rows(self) -> int:
        """From one batch entry's rows to the next one's; 0 where they share them."""
        return self.heads if self.batch > 1 else 0


class Lists(NamedTuple):
    keys: Tensor  # (mask rows, runs | 1, capacity) int32
    counts: Tensor  # (mask rows, runs, 2) int32: keys that need no test, all keys
    runs: int
    capacity: int


def make_layout(problem: Problem) -> Layout:
    batch, query_len, heads, head_dim = problem.query.shape
    key_len, kv_heads = problem.key.shape[1:3]
    by_key = (
        None if problem.mask is None or hides_queries(problem.mask) else problem.mask,
        problem.end,
        problem.bias if bias_kind(problem.bias) == KEY_BIAS else None,
    )
    units = heads if any(x is not None and x.size(1) == heads for x in by_key) else kv_heads
    return Layout(batch, query_len, key_len, heads, kv_heads, head_dim, units, heads // units)


def hides_queries(mask: Tensor) -> bool:
    """Whether a mask says something about queries alone."""
    return mask.size(2) > 1 and mask.size(3) == 1


def bias_kind(bias: Tensor | None) -> int:
    if bias is None:
        return NO_BIAS.value
    return KEY_BIAS.value if bias.size(2) == 1 else PAIR_BIAS.value


def make_mask(problem: Problem, layout: Layout) -> Mask:
    mask, end = problem.mask, problem.end
    made = Mask(1, 1, None, None, None, None, None, None, None)
    if mask is not None and hides_queries(mask):
        made, mask = made._replace(hidden=mask), None
    if mask is not None and mask.size(2) > 1:
        return made._replace(batch=mask.size(0), heads=mask.size(1), bits=_pack(mask, layout, problem.is_causal))
    if mask is not None:
        visible = mask[:, :, 0].expand(-1, -1, layout.key_len)
        return _list_once(made, visible, torch.ones_like(visible[..., :1]))
    if end is not None:
        survivors = problem.survivors
        if problem.is_causal and survivors is not None and 0 < survivors.size(3) < layout.key_len:
            batch, heads, _ = end.shape
            return made._replace(batch=batch, heads=heads, end=end.contiguous(), survivors=survivors.contiguous())
        # One list of the keys that any query sees.
        first = torch.full_like(end[:1, :1], layout.shift)
        if problem.is_causal:
            first = torch.maximum(first, torch.arange(layout.key_len, device=end.device))
        visible = end > first
        untested = ((end >= layout.key_len) | ~visible).all(-1, keepdim=True)
        made = _list_once(made, visible, untested)
        return made._replace(end=end.contiguous()) if problem.is_causal else made
    return made


def _list_once(made: Mask, visible: Tensor, untested: Tensor) -> Mask:
    """visible (batch, heads, K) bool."""
    batch, heads, key_len = visible.shape
    before = torch.nn.functional.pad(visible.cumsum(-1, dtype=torch.int32), (1, 0))
    slot = torch.where(visible, before[..., :-1], key_len).long()
    key = torch.arange(key_len, dtype=torch.int32, device=visible.device).expand(visible.shape)
    keys = key.new_zeros((batch, heads, key_len + 1)).scatter_(-1, slot, key)[..., :key_len]
    return made._replace(batch=batch, heads=heads, keys=keys.contiguous(), before=before, untested=untested)


def make_lists(mask: Mask, problem: Problem, layout: Layout, run_rows: int) -> Lists | None:
    """The lists of runs of that many rows; None: each run has the keys from 0 to its last position, or all."""
    runs = triton.cdiv(layout.rows, run_rows)
    if mask.keys is not None:
        assert mask.before is not None and mask.untested is not None
        batch, heads, key_len = mask.keys.shape
        if problem.is_causal:
            row = torch.arange(0, layout.rows, run_rows, device=mask.keys.device)
            first = (row // layout.group + layout.shift + 1).clamp(0, key_len)
            last = ((row + run_rows - 1).clamp(max=layout.rows - 1) // layout.group + layout.shift + 1).clamp(
                0, key_len
            )
            full, total = mask.before[..., first] * mask.untested, mask.before[..., last]
        else:
            total = mask.before[..., -1:].expand(batch, heads, runs)
            full = total * mask.untested
        counts = torch.stack((full, total), -1).view(-1, runs, 2)
        return Lists(mask.keys.view(-1, 1, key_len), counts, runs, key_len)
    if mask.survivors is None and mask.bits is None:
        return None
    rows = mask.batch * mask.heads
    chunk = slots = 0
    if mask.survivors is not None:
        slots = mask.survivors.size(3)
        chunk = int(operators.survivor_chunk(slots))
        # What survives at a run's start, and its own keys.
        capacity = min(layout.key_len, slots + triton.cdiv(run_rows, layout.group) + 1)
    else:
        capacity = layout.key_len
    keys = problem.query.new_empty((rows, runs, capacity), dtype=torch.int32)
    counts = keys.new_empty((rows, runs, 2))
    source = mask.survivors if mask.survivors is not None else mask.bits
    _list_keys[(rows * runs,)](
        source, mask.end if mask.end is not None else keys, keys, counts, runs, run_rows, capacity, layout.group,
        layout.query_len, layout.key_len, chunk, slots, triton.cdiv(layout.key_len, chunk) if chunk else 0,
        CAUSAL=problem.is_causal, SURVIVORS=mask.survivors is not None, BLOCK=BLOCK_CANDIDATES,
    )  # fmt: skip
    return Lists(keys, counts, runs, capacity)


def words_of(rows: int, group: int) -> int:
    """How many words of bits the queries of a tile of that many rows can be in."""
    if rows % group == 0 and rows // group % 32 == 0:
        return rows // group // 32
    last = (rows - 2) // group + 1  # from the first query of a tile, at most
    return (31 + last) // 32 + 1


def _pack(mask: Tensor, layout: Layout, is_causal: bool) -> Tensor:
    batch, heads, query_len, key_len = mask.size(0), mask.size(1), layout.query_len, layout.key_len
    words = triton.cdiv(query_len, 32)
    bits = mask.new_empty((batch, heads, words, key_len), dtype=torch.int32)
    _pack_bits[(batch * heads * words * triton.cdiv(key_len, BLOCK_PACKED),)](
        mask.view(torch.uint8), bits, *broadcast_strides(mask), heads, query_len, key_len, words,
        CAUSAL=is_causal, BLOCK=BLOCK_PACKED,
    )  # fmt: skip
    return bits


@triton.jit(do_not_specialize=["heads", "query_len", "key_len", "words"])
def _pack_bits(
    mask, bits, mask_b, mask_h, mask_q, mask_k, heads, query_len, key_len, words,
    CAUSAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program packs one word of each of BLOCK keys."""
    blocks = tl.cdiv(key_len, BLOCK)
    block = tl.program_id(0) % blocks
    word = tl.program_id(0) // blocks % words
    row = (tl.program_id(0) // blocks // words).to(tl.int64)
    key = block * BLOCK + tl.arange(0, BLOCK)
    bit = tl.arange(0, 32)
    query = word * 32 + bit
    exists = (query < query_len)[:, None] & (key < key_len)[None, :]
    offsets = query.to(tl.int64)[:, None] * mask_q + key.to(tl.int64)[None, :] * mask_k
    seen = tl.load(mask + row // heads * mask_b + row % heads * mask_h + offsets, mask=exists, other=0) != 0
    if CAUSAL:
        seen = seen & (key[None, :] <= query[:, None] + (key_len - query_len))
    packed = tl.sum(seen.to(tl.int32) << bit[:, None], 0)
    tl.store(bits + (row * words + word) * key_len + key, packed, mask=key < key_len)


@triton.jit(do_not_specialize=["runs", "run_rows", "capacity", "group", "query_len", "key_len", "slots", "chunks"])
def _list_keys(
    source, end, keys, counts, runs, run_rows, capacity, group, query_len, key_len, chunk, slots, chunks,
    CAUSAL: tl.constexpr, SURVIVORS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program makes the list of one run of one mask row: the keys that all its queries see, then the others.

    source: survivors, or bits.
    """
    run = tl.program_id(0) % runs
    row = (tl.program_id(0) // runs).to(tl.int64)
    first_query = run * run_rows // group
    last_query = tl.minimum((run * run_rows + run_rows - 1) // group, query_len - 1)
    first = first_query + (key_len - query_len)
    stop = last_query + (key_len - query_len) + 1
    end += row * key_len
    # Candidates: what survives at the start of the run's chunk, and the keys from there on.
    chunk_start = 0
    listed = 0
    total = key_len
    if CAUSAL:
        total = tl.minimum(tl.maximum(stop, 0), key_len)
    if SURVIVORS:
        at_chunk = tl.maximum(first, 0) // chunk
        chunk_start = at_chunk * chunk
        if at_chunk > 0:
            listed = slots
        total = listed + tl.maximum(stop - chunk_start, 0)
        source += (row * chunks + at_chunk) * slots
    else:
        source += row * tl.cdiv(query_len, 32) * key_len
    out = keys + (row * runs + run) * capacity

    full_count = 0
    if total > BLOCK:
        for start in range(0, total, BLOCK):
            _, full, _ = _candidates(
                source, end, start, total, listed, chunk_start, first, stop, first_query, last_query, key_len,
                SURVIVORS, BLOCK,
            )  # fmt: skip
            full_count += tl.sum(full.to(tl.int32))
    full_at = 0
    other_at = 0
    for start in range(0, total, BLOCK):
        key, full, other = _candidates(
            source, end, start, total, listed, chunk_start, first, stop, first_query, last_query, key_len,
            SURVIVORS, BLOCK,
        )  # fmt: skip
        # The counts of both in one number, up to here.
        ones = full.to(tl.int32) | other.to(tl.int32) << 16
        before = tl.cumsum(ones, 0) - ones
        found = tl.sum(ones)
        if total <= BLOCK:
            full_count = found & 0xFFFF
        slot = tl.where(full, full_at + (before & 0xFFFF), full_count + other_at + (before >> 16))
        tl.store(out + slot, key, mask=(full | other) & (slot < capacity))
        full_at += found & 0xFFFF
        other_at += found >> 16
    full_count = tl.minimum(full_count, capacity)
    tl.store(counts + (row * runs + run) * 2, full_count)
    tl.store(counts + (row * runs + run) * 2 + 1, tl.minimum(full_count + other_at, capacity))


@triton.jit
def _candidates(
    source, end, start, total, listed, chunk_start, first, stop, first_query, last_query, key_len,
    SURVIVORS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Keys, which of them all queries of the run see, and which only some."""
    entry = start + tl.arange(0, BLOCK)
    if SURVIVORS:
        key = tl.load(source + entry, mask=entry < listed, other=-1)
        key = tl.where(key < chunk_start, key, -1)
        key = tl.where(entry < listed, key, chunk_start + entry - listed)
        exists = (entry < total) & (key >= 0)
        ends = tl.load(end + key, mask=exists, other=0)
        full = exists & (key <= first) & (ends >= stop)
        seen = exists & (ends > tl.maximum(key, first))
    else:
        key = entry
        exists = entry < total
        some = tl.zeros([BLOCK], tl.int32)
        all_seen = tl.full([BLOCK], -1, tl.int32)
        for word in range(first_query // 32, last_query // 32 + 1):
            # The bits of the run's queries.
            low = tl.maximum(first_query - word * 32, 0)
            high = tl.minimum(last_query - word * 32, 31)
            wanted_bits = ((-1 << low) & ((2 << high) - 1)).to(tl.int32)
            found_bits = tl.load(source + word * key_len.to(tl.int64) + key, mask=exists, other=0)
            some = some | (found_bits & wanted_bits)
            all_seen = all_seen & (found_bits | ~wanted_bits)
        full = exists & (all_seen == -1)
        seen = exists & (some != 0)
    return key, full, seen & (full == 0)


def key_bias_arguments(problem: Problem, layout: Layout, mask: Mask, lists: Lists | None) -> dict[str, Any]:
    """The bias of each key as the tiles of keys want it: in float32 and base 2, in the order of a run's list.

    Loads of it are contiguous and of 4 bytes, which can be asynchronous; a gathered one would hold up the products.
    """
    bias = problem.bias
    if bias is None or bias_kind(bias) != KEY_BIAS.value:
        return {"key_bias": problem.query, "key_bias_unit": 0, "key_bias_run": 0}
    runs = 1 if lists is None else lists.keys.size(1)
    capacity = layout.key_len if lists is None else lists.capacity
    rows = layout.batch * layout.units
    made = bias.new_empty((rows, runs, capacity), dtype=torch.float32)
    blocks = triton.cdiv(capacity, BLOCK_BIAS)
    strides = broadcast_strides(bias)
    _list_bias[(rows * runs * blocks,)](
        bias.detach(), made if lists is None else lists.keys, made if lists is None else lists.counts, made,
        strides[0], strides[1], strides[3], bias.size(1), layout.units, mask.heads, mask.batch_rows,
        runs, blocks, capacity,
        LISTED=lists is not None, COUNTED=lists is not None and lists.runs == runs, BLOCK=BLOCK_BIAS,
    )  # fmt: skip
    return {"key_bias": made, "key_bias_unit": runs * capacity, "key_bias_run": capacity if runs > 1 else 0}


@triton.jit(
    do_not_specialize=[
        "bias_b", "bias_h", "bias_heads", "units", "mask_heads", "mask_b", "runs", "blocks", "capacity",
    ]
)  # fmt: skip
def _list_bias(
    bias, keys, counts, made, bias_b, bias_h, bias_k, bias_heads, units, mask_heads, mask_b, runs, blocks, capacity,
    LISTED: tl.constexpr, COUNTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program has BLOCK entries of the list of one run of one unit."""
    block = tl.program_id(0) % blocks
    run = tl.program_id(0) // blocks % runs
    row = (tl.program_id(0) // blocks // runs).to(tl.int64)
    unit = row % units
    entry = block * BLOCK + tl.arange(0, BLOCK)
    exist = entry < capacity
    k = entry
    if LISTED:
        list_row = (row // units * mask_b + unit * mask_heads // units) * runs + run
        if COUNTED:
            exist = entry < tl.load(counts + 2 * list_row + 1)  # beyond nothing was written
        k = tl.load(keys + list_row * capacity + entry, mask=exist, other=0)
    bias += row // units * bias_b + (unit * bias_heads // units) * bias_h
    found = tl.load(bias + k.to(tl.int64) * bias_k, mask=exist, other=0.0)
    tl.store(made + (row * runs + run) * capacity + entry, to_base_2(found), mask=exist)


def logit_factor(problem: Problem) -> float:
    """What `logits` multiplies products by."""
    return problem.scale / problem.softcap if problem.softcap else problem.scale * LOG2_E.value


def block_d(layout: Layout) -> int:
    return max(16, triton.next_power_of_2(layout.head_dim))


def broadcast_strides(tensor: Tensor | None) -> list[int]:
    if tensor is None:
        return [0] * 4
    return [0 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]


def kernel_arguments(problem: Problem, layout: Layout, mask: Mask, lists: Lists | None) -> dict[str, Any]:
    """What forward and backward kernels are told alike. Strides of broadcast dimensions are 0."""
    query, key, value, _, bias, *_ = problem
    placeholder = query  # of pointers that are not read
    kind = bias_kind(bias)

    bias_strides = broadcast_strides(bias)
    return {
        "query": query,
        "key": key,
        "value": value,
        "bias": placeholder if bias is None else bias.detach(),
        "end": placeholder if mask.end is None else mask.end,
        "bits": placeholder if mask.bits is None else mask.bits,
        "keys": placeholder if lists is None else lists.keys,
        "counts": placeholder if lists is None else lists.counts,
        "query_b": query.stride(0),
        "query_q": query.stride(1),
        "query_h": query.stride(2),
        "key_b": key.stride(0),
        "key_k": key.stride(1),
        "key_h": key.stride(2),
        "value_b": value.stride(0),
        "value_k": value.stride(1),
        "value_h": value.stride(2),
        "bias_b": bias_strides[0],
        "bias_h": bias_strides[1],
        "bias_q": bias_strides[2],
        "bias_k": bias_strides[3],
        "heads": layout.heads,
        "kv_heads": layout.kv_heads,
        "units": layout.units,
        "bias_heads": 1 if bias is None else bias.size(1),
        "mask_heads": mask.heads,
        "mask_b": mask.batch_rows,
        "query_len": layout.query_len,
        "key_len": layout.key_len,
        "runs": 1 if lists is None else lists.runs,
        "keys_row": 0 if lists is None else lists.keys.stride(0),
        "keys_run": 0 if lists is None or lists.keys.size(1) == 1 else lists.keys.stride(1),
        "factor": logit_factor(problem),
        "softcap": problem.softcap,
        "HEAD_DIM": layout.head_dim,
        "BLOCK_D": block_d(layout),
        "GROUP": layout.group,
        "CAUSAL": problem.is_causal,
        "HAS_END": mask.end is not None,
        "LISTED": lists is not None,
        "BIAS": kind,
        "SOFTCAP": problem.softcap > 0,
    }
