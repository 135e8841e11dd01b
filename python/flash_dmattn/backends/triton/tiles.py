"""What a tile of attention is made of, for all kernels: logits, the test of a pair, rows of a list.

Queries and keys come as int32 of any shapes that broadcast against each other, so that a kernel may have scores as
rows × keys or as keys × rows. Logits are in base 2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)
LARGEST: tl.constexpr = tl.constexpr(3.4028234663852886e38)

NO_BIAS: tl.constexpr = tl.constexpr(0)
KEY_BIAS: tl.constexpr = tl.constexpr(1)  # one value for each key of a unit
PAIR_BIAS: tl.constexpr = tl.constexpr(2)  # one for each query, head and key


# Triton's interpreter has bfloat16 as bits, and multiplies those.
INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)


# float32 products are made of six of bfloat16 parts, on tensor cores; AMD's have float32 products.
FLOAT32_PRODUCTS: tl.constexpr = tl.constexpr("ieee" if torch.version.hip else "bf16x6")


@triton.jit
def product(a, b, acc):
    """a @ b + acc, in float32, of which no operand loses a bit."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    if a.dtype == tl.float32:
        return tl.dot(a, b, acc, input_precision=FLOAT32_PRODUCTS)
    return tl.dot(a, b, acc)


@triton.jit
def to_base_2(x):
    """x log2(e) in float32. What is finite stays finite: the lowest number, as a bias, is not -inf."""
    x = x.to(tl.float32)
    return tl.where(tl.abs(x) == float("inf"), x, tl.minimum(tl.maximum(x * LOG2_E, -LARGEST), LARGEST))


@triton.jit
def tanh(x):
    """To a few roundings, relative, by what every GPU has. (libdevice is NVIDIA's.)"""
    square = x * x
    # Taylor's series, whose next term is below a rounding up to 1/4.
    near = x + x * square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835))))
    t = tl.exp2(tl.abs(x) * (-2 * LOG2_E))
    far = (1 - t) / (1 + t)
    return tl.where(square < 0.0625, near, tl.where(x < 0, -far, far))


@triton.jit
def logits(products, factor, softcap, SOFTCAP: tl.constexpr):
    """From q · k to logits in base 2, without bias, and the tanh that is in them (else nothing of use).

    factor: scale / softcap if there is a softcap, else scale log2(e).
    """
    if SOFTCAP:
        bent = tanh(products * factor)
        return bent * (softcap * LOG2_E), bent
    return products * factor, products


@triton.jit
def probability(s, lse):
    """2^(s - lse). Logits beyond 2^24 in magnitude, and an lse of them, have no room for fractions: 1 at most."""
    return tl.minimum(tl.exp2(s - lse), 1.0)


@triton.jit
def is_visible(
    query, key, ends, listed, first_word, bits, query_len, key_len,
    CAUSAL: tl.constexpr, HAS_END: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Whether a query sees a key. ends: of the keys (`load_ends`). listed: whether the key is one.

    With WORDS, bits, those of the mask row, say it all: the tile's queries are in that many words from first_word on.
    """
    position = query + (key_len - query_len)
    visible = listed & (position >= key_len - query_len)
    if WORDS > 0:
        seen = visible & (query < 0)
        for i in tl.static_range(WORDS):
            word = first_word + i
            there = tl.minimum(word, (query_len - 1) // 32)  # a tile may reach beyond the last
            found = tl.load(bits + there * key_len.to(tl.int64) + key, mask=listed, other=0)
            seen = seen | ((query // 32 == word) & (((found >> (query % 32)) & 1) != 0))
        visible = visible & seen
    else:
        if CAUSAL:
            visible = visible & (key <= position)
        if HAS_END:
            visible = visible & (position < ends)
    return visible


@triton.jit
def load_rows(start, offsets, exist, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """(rows, BLOCK_D) from start + offsets; 0 where there is nothing."""
    dim = tl.arange(0, BLOCK_D)
    pointers = start + offsets[:, None] + dim[None, :]
    if MASKED:
        if HEAD_DIM == BLOCK_D:
            return tl.load(pointers, mask=exist[:, None], other=0.0)
        return tl.load(pointers, mask=exist[:, None] & (dim < HEAD_DIM)[None, :], other=0.0)
    if HEAD_DIM == BLOCK_D:
        return tl.load(pointers)
    return tl.load(pointers, mask=(dim < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def load_entries(start, entry, listed, MASKED: tl.constexpr):
    """What a list says beside its keys; 0 where there is none."""
    if MASKED:
        return tl.load(start + entry, mask=listed, other=0)
    return tl.load(start + entry)


@triton.jit
def load_ends(end, key, listed, HAS_END: tl.constexpr):
    """The position from which on no query sees a key, if there is one. end: of the mask row."""
    if HAS_END:
        return tl.load(end + key, mask=listed, other=0)
    return key


@triton.jit
def store_rows(start, offsets, exist, rows, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    dim = tl.arange(0, BLOCK_D)
    mask = exist[:, None] & (dim < HEAD_DIM)[None, :]
    tl.store(start + offsets[:, None] + dim[None, :], rows.to(start.dtype.element_ty), mask=mask)


@triton.jit
def count_keys(counts, run, first_query, last_query, query_len, key_len, CAUSAL: tl.constexpr, LISTED: tl.constexpr):
    """How many keys of a run's list all of its queries see, which come first, and how many there are.

    counts: of the mask row.
    """
    if LISTED:
        full = tl.load(counts + 2 * run)
        total = tl.load(counts + 2 * run + 1)
    else:
        full = key_len
        total = key_len
        if CAUSAL:
            shift = key_len - query_len
            full = tl.minimum(tl.maximum(first_query + shift + 1, 0), key_len)
            total = tl.minimum(tl.maximum(last_query + shift + 1, 0), key_len)
    return full, total
