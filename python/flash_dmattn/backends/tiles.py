"""Attention as FlexAttention takes it: tiles of queries with their keys, and lists of the blocks that are not empty.

A tile is a batch entry of FlexAttention. Either it is a batch entry of the problem, with all of its keys; or, under a
causal dynamic mask whose survivors are known, it is a run of query positions with the keys that it can see, gathered.
Who sees whom is two numbers per key. Nothing here waits for the device, or makes anything of size query_len x key_len.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import operators
from ..problem import Problem

BLOCK = 128  # queries, and keys, of which FlexAttention skips all or none
NEVER = 2**30  # as a start: no query sees the key
SHORTEST_TILE, LONGEST_TILE = 512, 32768  # of gathered keys; a longer one's order does not fit into an int32


class Tiles(NamedTuple):
    """T tiles of Q queries and K keys. Sizes that follow from the problem's are rounded up to powers of two.

    visible(t, h, q, k) = start[t, h, k] <= q < end[t, h, k] and mask[t, h, q, k].
    """

    query: Tensor  # (T, H, Q, D)
    key: Tensor  # (T, Hk | H, K, D)
    value: Tensor  # (T, Hk | H, K, D)
    start: Tensor  # (T, H, K) int32
    end: Tensor  # (T, H, K) int32
    mask: Tensor | None  # (T | 1, 1 | Hk | H, Q, 1 | K) bool
    bias: Tensor | None  # (T, H, 1, K) or (T | 1, 1 | Hk | H, Q, 1 | K)


class Cut(NamedTuple):
    """Where the problem's queries are in the rows of a batch entry's tiles, one tile after the other."""

    batch: int
    tiles: int  # of a batch entry, those that fill up the last power of two included
    first: int  # how many rows of the first tile stand before the first query
    query_len: int


class Blocks(NamedTuple):
    """The blocks that some query of a tile sees into, in lists: FlexAttention's BlockMask. The last half is for the
    backward pass, from blocks of keys to those of queries."""

    partial_count: Tensor  # (T, H, blocks of queries) int32
    partial: Tensor  # (T, H, blocks of queries, blocks of keys) int32
    full_count: Tensor
    full: Tensor
    query_partial_count: Tensor | None = None  # (T, H, blocks of keys) int32
    query_partial: Tensor | None = None  # (T, H, blocks of keys, blocks of queries) int32
    query_full_count: Tensor | None = None
    query_full: Tensor | None = None


def make_tiles(problem: Problem) -> tuple[Tiles, Cut]:
    return _gathered(problem) if _can_gather(problem) else _whole(problem)


def rows_of(tiled: Tensor, cut: Cut) -> Tensor:
    """Of (T, H, Q, ...) what belongs to queries: (B, query_len, H, ...)."""
    rows = tiled.transpose(1, 2).unflatten(0, (-1, cut.tiles))[: cut.batch].flatten(1, 2)
    return rows[:, cut.first : cut.first + cut.query_len]


def round_up(size: int, least: int = 1) -> int:
    """To a power of two: kernels are compiled for sizes, and there are few of these."""
    return max(least, 1 << max(0, size - 1).bit_length())


def _whole(problem: Problem) -> tuple[Tiles, Cut]:
    """A tile for each batch entry, with all keys."""
    query, key, value, mask, bias, *_ = problem
    batch, query_len, heads, _ = query.shape
    key_len = key.size(1)
    sizes = round_up(batch), round_up(query_len, BLOCK), round_up(key_len, BLOCK)

    def heads_first(tensor: Tensor, length: int) -> Tensor:
        return _pad(tensor, sizes[0], length, tensor.size(2), _head_dim(query)).transpose(1, 2)

    def pairs(tensor: Tensor) -> Tensor:
        """A mask or bias, filled up where it is not broadcast."""
        size = [wanted if had > 1 else 1 for had, wanted in zip(tensor.shape, (sizes[0], 0, *sizes[1:]), strict=True)]
        return _pad(tensor, size[0], tensor.size(1), *size[2:])

    if bias is not None:
        bias = pairs(bias) if bias.size(2) > 1 else _pad(_per_key(bias, problem), sizes[0], heads, 1, sizes[2])
    start, end = (
        _pad(_heads_at(x, 1, heads).expand(batch, heads, key_len), sizes[0], heads, sizes[2])
        for x in _intervals(problem, first_position=key_len - query_len)
    )
    tiles = Tiles(
        heads_first(query, sizes[1]),
        heads_first(key, sizes[2]),
        heads_first(value, sizes[2]),
        *_hide(start, end),
        pairs(mask) if mask is not None and mask.size(2) > 1 else None,
        bias,
    )
    return tiles, Cut(batch, 1, 0, query_len)


def _can_gather(problem: Problem) -> bool:
    """Whether there are survivors from which each tile's keys follow, and enough keys to save some."""
    key_len, query_len, survivors = problem.key.size(1), problem.query.size(1), problem.survivors
    if problem.end is None or survivors is None or survivors.numel() == 0 or not problem.is_causal:
        return False
    if query_len > key_len or any(x is not None and x.size(2) > 1 for x in (problem.mask, problem.bias)):
        return False
    # Survivors that a window of all keys left do not tell the length of their chunks.
    chunk, length = _sizes_of(survivors)
    return survivors.size(2) == -(-key_len // chunk) and length <= LONGEST_TILE and 4 * length <= key_len


def _sizes_of(survivors: Tensor) -> tuple[int, int]:
    """How long its chunks are, and a tile: as long as the window, and whole chunks."""
    chunk = int(operators.survivor_chunk(survivors.size(3)))
    return chunk, round_up(max(survivors.size(3), chunk), SHORTEST_TILE)


def _gathered(problem: Problem) -> tuple[Tiles, Cut]:
    """A tile for each run of positions. Its keys are those that survive at its start, and its own."""
    query, key, value, _, bias, _, survivors, *_ = problem
    assert survivors is not None
    batch, query_len, heads, _ = query.shape
    key_len, kv_heads = key.shape[1:3]
    device, (chunk, length) = query.device, _sizes_of(survivors)
    first_tile, first = divmod(key_len - query_len, length)
    tiles = round_up(-(-(first + query_len) // length))
    cut = Cut(batch, tiles, first, query_len)

    survivors = survivors[:, :, first_tile * (length // chunk) :: length // chunk]
    keys, start, end = _key_lists(problem, survivors, first_tile, tiles, length)
    # Rows of key and value, (batch, tiles, heads, keys), with as many heads as have lists of their own.
    gathered_heads = kv_heads if keys.size(2) in (1, kv_heads) else heads
    head = torch.arange(gathered_heads, device=device) // (gathered_heads // kv_heads)
    entry = torch.arange(batch, device=device)[:, None, None, None]
    rows = (entry * key_len + keys) * kv_heads + head[:, None]

    def gather(tensor: Tensor) -> Tensor:
        tensor = _pad(tensor, *tensor.shape[:3], _head_dim(query))
        # Its gradient is a sum in float32, in the same order each time.
        return F.embedding(rows, tensor.reshape(-1, tensor.size(3))).flatten(0, 1)

    if bias is not None:
        bias = _per_key(bias, problem).squeeze(2)  # (B, H, key_len)
        head = torch.arange(heads, device=device)
        rows_of_bias = (entry * heads + head[:, None]) * key_len + _heads_at(keys, 2, heads)
        bias = F.embedding(rows_of_bias, bias.reshape(-1, 1)).flatten(0, 1).squeeze(3).unsqueeze(2)
    if first:
        query = F.pad(query, (0, 0, 0, 0, first, 0))
    query = _pad(query, batch, tiles * length, heads, _head_dim(query))
    start, end = (_heads_at(x, 2, heads).expand(batch, -1, heads, -1).flatten(0, 1).contiguous() for x in (start, end))
    tiled = query.unflatten(1, (tiles, length)).flatten(0, 1).transpose(1, 2)

    def entries(tensor: Tensor) -> Tensor:
        return _pad(tensor, round_up(batch) * tiles, *tensor.shape[1:])

    return Tiles(
        query=entries(tiled),
        key=entries(gather(key)),
        value=entries(gather(value)),
        start=entries(start),
        end=entries(end),
        mask=None,
        bias=None if bias is None else entries(bias),
    ), cut


def _key_lists(
    problem: Problem, survivors: Tensor, first_tile: int, tiles: int, length: int
) -> tuple[Tensor, Tensor, Tensor]:
    """keys, start, end (B | 1, tiles, heads, 2 length): the position of each tile's keys, and the rows that see them.

    First come the keys that all rows of the tile see, then those that are beaten in it, the last to be so first, then
    the tile's own in their order, and last what no row sees.
    """
    key_len, ends = problem.key.size(1), _intervals(problem, first_position=0)[1]
    survivors = _heads_at(survivors, 1, ends.size(1)).transpose(1, 2).expand(ends.size(0), -1, -1, -1)
    survivors = F.pad(survivors, (0, length - survivors.size(3), 0, 0, 0, tiles - survivors.size(1)), value=-1)
    tile_start = length * torch.arange(first_tile, first_tile + tiles, device=ends.device)[:, None, None]
    own = (tile_start + torch.arange(length, device=ends.device)).expand(*survivors.shape[:3], length)
    keys = torch.cat((torch.where(survivors < tile_start, survivors, -1), own), 3)
    exists = (keys >= 0) & (keys < key_len)
    # A place in the list that is empty has some key all the same, another one each, that no row sees.
    place = torch.arange(2 * length, device=ends.device) % key_len
    keys = torch.where(exists, keys, place)

    end = ends.unsqueeze(1).expand(-1, tiles, -1, -1).gather(3, keys) - tile_start
    start = (keys - tile_start).clamp(min=0)
    is_hidden = ~exists | (end <= start)
    start, end = start.masked_fill(is_hidden, length), end.clamp(max=length).masked_fill(is_hidden, 0)
    order, places = (start * (length + 1) + (length - end)).int().sort(3)
    start, end = order // (length + 1), length - order % (length + 1)
    return keys.gather(3, places), *_hide(start, end)


def make_blocks(tiles: Tiles, cut: Cut, *, backward: bool) -> Blocks:
    first = torch.arange(0, tiles.query.size(2), BLOCK, dtype=torch.int32, device=tiles.start.device)[:, None]
    last = first + (BLOCK - 1)
    least_start, most_start = tiles.start.unflatten(2, (-1, BLOCK)).aminmax(dim=3)
    least_end, most_end = tiles.end.unflatten(2, (-1, BLOCK)).aminmax(dim=3)
    some = (least_start[:, :, None] <= last) & (most_end[:, :, None] > first) & (first < cut.first + cut.query_len)
    full = (most_start[:, :, None] <= first) & (least_end[:, :, None] > last)
    if tiles.mask is not None:
        visible = _visible_pairs(tiles.mask)  # of each block
        visible = _heads_at(visible, 1, tiles.query.size(1))
        some = some & (visible > 0)
        full = full & (visible == BLOCK * min(BLOCK, tiles.mask.size(3)))
    full = some & full
    blocks = torch.stack((some ^ full, full))
    return Blocks(*_lists(blocks), *_lists(blocks.mT)) if backward else Blocks(*_lists(blocks))


def _visible_pairs(mask: Tensor) -> Tensor:
    """Of each block of a dense mask, (b, h, blocks of queries, 1 | blocks of keys)."""
    columns = min(BLOCK, mask.size(3))
    return mask.unflatten(3, (-1, columns)).unflatten(2, (-1, BLOCK)).sum((3, 5), dtype=torch.int32)


def _lists(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of partial and of full blocks: how many of the last dimension there are, and which: those come first, in order.

    Contiguous: FlexAttention's kernels do not look at the stride of a list.
    """
    order = blocks.to(torch.uint8).argsort(dim=-1, descending=True, stable=True).to(torch.int32).contiguous()
    counts = blocks.sum(-1, dtype=torch.int32).contiguous()
    return counts[0], order[0], counts[1], order[1]


def _intervals(problem: Problem, first_position: int) -> tuple[Tensor, Tensor]:
    """start and end (B | 1, heads, key_len) int32, in positions after the first: causality, `end` and a per-key mask in
    one."""
    key_len, device = problem.key.size(1), problem.query.device
    if problem.is_causal:
        start = torch.arange(-first_position, key_len - first_position, dtype=torch.int32, device=device)
    else:
        start = torch.full((key_len,), -NEVER, dtype=torch.int32, device=device)
    if problem.end is None:
        end = torch.full((1, 1, key_len), NEVER, dtype=torch.int32, device=device)
    else:
        end = problem.end - first_position
    mask = problem.mask
    if mask is not None and mask.size(2) == 1:
        mask = mask.squeeze(2)
        heads = max(mask.size(1), end.size(1))
        end = torch.where(_heads_at(mask, 1, heads), _heads_at(end, 1, heads), -NEVER)
    return start[None, None], end


def _hide(start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """Intervals of which the empty ones hold nothing of a block open."""
    is_hidden = (end <= start) | (end <= 0)
    return start.masked_fill(is_hidden, NEVER), end.masked_fill(is_hidden, 0)


def _per_key(bias: Tensor, problem: Problem) -> Tensor:
    """(B, H, 1, key_len), whatever was broadcast: small, and so all of them share a kernel."""
    batch, _, heads, _ = problem.query.shape
    return _heads_at(bias, 1, heads).expand(batch, heads, 1, problem.key.size(1)).contiguous()


def _heads_at(tensor: Tensor, dim: int, heads: int) -> Tensor:
    """With `heads` heads, or 1: KV heads are repeated for their query heads."""
    has = tensor.size(dim)
    return tensor if has in (1, heads) else tensor.repeat_interleave(heads // has, dim=dim)


def _head_dim(query: Tensor) -> int:
    """On GPUs FlexAttention takes no less than 16."""
    return max(16, query.size(3))


def _pad(tensor: Tensor, *size: int) -> Tensor:
    """With zeros, at the end of each dimension."""
    padding = [wanted - had for wanted, had in zip(size, tensor.shape, strict=True)]
    if not any(padding):
        return tensor
    return F.pad(tensor, [after for missing in reversed(padding) for after in (0, missing)])
