"""The dynamic mask in torch operations, on any device: what the engine's operators give, where there is no engine.

Keys become ranks, whole numbers without ties: a key's place in the order by (score, position). A wavelet matrix then
finds for every position the w-th largest rank up to it, bit by bit: O(K log K) for a whole row, nothing sequential.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import operators

LOWEST = torch.iinfo(torch.int64).min
PAIRS_AT_ONCE = 1 << 26  # of which select_keys sorts the scores, to bound its memory


def ordered(score: Tensor) -> Tensor:
    """int64 with the order of the scores: -0 equals +0, NaN is below all numbers and above the smallest int64."""
    wide = torch.float64 if score.dtype == torch.float64 else torch.float32
    number = score.to(wide).masked_fill(score == 0, 0)
    bits = number.view(torch.int64 if wide == torch.float64 else torch.int32)
    least, bits = torch.iinfo(bits.dtype).min, bits.long()
    bits = torch.where(bits < 0, least - bits, bits)  # of a negative number: - its magnitude
    return bits.masked_fill(number.isnan(), LOWEST + 1)


def dynamic_mask(
    score: Tensor, visible: Tensor | None, keep_window_size: int, query_len: int, is_causal: bool
) -> tuple[Tensor, Tensor]:
    """(end, survivors) as `operators.dynamic_mask` makes them on a GPU; survivors of a chunk in the order of keys."""
    batch, heads, key_len = score.shape
    if score.numel() == 0:
        return score.new_empty(score.shape, dtype=torch.int32), score.new_empty((batch, heads, 0, 0), dtype=torch.int32)
    number = ordered(score)
    if visible is not None:
        number = number.masked_fill(~visible[:, None], LOWEST)  # beats nobody
    number = number.view(batch * heads, key_len)
    position = torch.arange(key_len, device=score.device)
    by_rank = number.sort(dim=-1, stable=True).indices
    rank = torch.empty_like(by_rank).scatter_(-1, by_rank, position.expand_as(by_rank))
    exists = torch.ones_like(rank, dtype=torch.bool)
    if visible is not None:
        exists = visible[:, None].expand(batch, heads, key_len).reshape(rank.shape)
    if not is_causal:
        never = min(0, key_len - query_len)
        end = torch.where((rank >= key_len - keep_window_size) & exists, key_len, never)
        return end.int().view(batch, heads, key_len), score.new_empty((batch, heads, 0, 0), dtype=torch.int32)
    # The first position at or after the key at which the threshold has passed it.
    end = torch.searchsorted(_thresholds(rank, keep_window_size), rank, right=True)
    end = torch.where(exists, torch.maximum(end, position), position)
    survivors = _survivors(end, keep_window_size)
    return end.int().view(batch, heads, key_len), survivors.view(batch, heads, *survivors.shape[1:])


def _thresholds(rank: Tensor, keep_window_size: int) -> Tensor:
    """rank (rows, K), a permutation of 0 to K - 1 -> (rows, K): the w-th largest up to each position, else -1."""
    key_len = rank.size(1)
    now = rank
    left, right = torch.zeros_like(rank), torch.arange(1, key_len + 1, device=rank.device).expand_as(rank)
    wanted = torch.full_like(rank, keep_window_size)
    threshold = torch.zeros_like(rank)
    for bit in reversed(range((key_len - 1).bit_length())):
        # Numbers with a 0 move before those with a 1, in order; those of a position's prefix stay together.
        one = now >> bit & 1
        ones = torch.nn.functional.pad(one.cumsum(-1), (1, 0))
        zeros = key_len - ones[:, -1:]
        left_ones, right_ones = ones.gather(-1, left), ones.gather(-1, right)
        count = right_ones - left_ones
        is_one = count >= wanted
        threshold = threshold + (is_one.long() << bit)
        wanted = torch.where(is_one, wanted, wanted - count)
        left = torch.where(is_one, zeros + left_ones, left - left_ones)
        right = torch.where(is_one, zeros + right_ones, right - right_ones)
        place = torch.where(one > 0, zeros + ones[:, :-1], torch.arange(key_len, device=rank.device) - ones[:, :-1])
        now = torch.empty_like(now).scatter_(-1, place, now)
    return threshold.masked_fill_(torch.arange(key_len, device=rank.device) < keep_window_size - 1, -1)


def _survivors(end: Tensor, keep_window_size: int) -> Tensor:
    """end (rows, K) -> (rows, chunks, slots) int32: the keys that are there at the start of each chunk, then -1."""
    rows, key_len = end.shape
    chunk = int(operators.survivor_chunk(keep_window_size))
    chunks, slots = (key_len + chunk - 1) // chunk, min(keep_window_size, key_len)
    own = torch.arange(key_len, device=end.device) // chunk
    held = (end // chunk).clamp(max=chunks - 1) - own  # A key is there at the starts of so many chunks after its own.
    upto = held.cumsum(-1)
    entry = torch.arange(chunks * slots, device=end.device).expand(rows, -1)  # pairs of a key and a chunk
    key = torch.searchsorted(upto, entry.contiguous(), right=True)
    exists, key = key < key_len, key.clamp(max=key_len - 1)
    at = torch.where(exists, own[key] + 1 + entry - (upto - held).gather(-1, key), chunks)
    at, order = at.sort(dim=-1, stable=True)
    first = torch.searchsorted(at, torch.arange(chunks, device=end.device).expand(rows, -1).contiguous())
    slot = entry - first.gather(-1, at.clamp(max=chunks - 1))
    place = torch.where(at < chunks, at * slots + slot, chunks * slots)
    survivors = torch.full((rows, chunks * slots + 1), -1, dtype=torch.int32, device=end.device)
    survivors.scatter_(-1, place, key.gather(-1, order).int())
    return survivors[:, :-1].reshape(rows, chunks, slots)


def select_keys(score: Tensor, visible: Tensor | None, keep_window_size: int, is_causal: bool) -> Tensor:
    """(batch, heads, query_len, key_len) bool as `operators.select_keys` gives it."""
    batch, heads, query_len, key_len = score.shape
    rows = max(1, PAIRS_AT_ONCE // max(1, batch * heads * key_len))
    position = torch.arange(key_len, device=score.device)
    selected = score.new_empty(score.shape, dtype=torch.bool)
    for first in range(0, query_len, rows):
        number = ordered(score[:, :, first : first + rows])
        seen = torch.ones_like(number, dtype=torch.bool)
        if visible is not None:
            seen = seen & visible[:, :, first : first + rows]
        if is_causal:
            query = torch.arange(first, first + number.size(2), device=score.device)
            seen = seen & (position <= query[:, None] + (key_len - query_len))
        if keep_window_size < key_len:
            number = number.masked_fill(~seen, LOWEST)
            worst = number.topk(keep_window_size, -1, sorted=False).values.amin(-1, keepdim=True)
            better, equal = number > worst, (number == worst) & seen
            # The newest of the equal ones, as many as there is room for.
            newer = equal.flip(-1).cumsum(-1).flip(-1)
            seen = better | (equal & (newer <= keep_window_size - better.sum(-1, keepdim=True)))
        selected[:, :, first : first + rows] = seen
    return selected
