"""DynamicMask: which keys are among the best that a query may see, as one number per key."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from . import checks, operators, selection


def _maker(score: Tensor) -> ModuleType:
    """The engine; torch operations for GPUs that it has no kernels for."""
    return operators if score.is_cpu or (score.is_cuda and not operators.CUDA_MISSING) else selection


def select_keys(score: Tensor, visible: Tensor | None, keep_window_size: int, is_causal: bool) -> Tensor:
    """(batch, heads, query_len, key_len) bool: the best keys of every row of score, among the visible."""
    selected: Tensor = _maker(score).select_keys(score, visible, keep_window_size, is_causal)
    return selected


def make_dynamic_mask(
    score: Tensor, visible: Tensor | None, keep_window_size: int, query_len: int, is_causal: bool
) -> tuple[Tensor, Tensor]:
    """(end, survivors) of a `DynamicMask`, from score (batch, heads, key_len) and visible (batch | 1, key_len) bool."""
    end, survivors = _maker(score).dynamic_mask(score, visible, keep_window_size, query_len, is_causal)
    return end, survivors


class DynamicMask:
    """The mask under which a query attends to the `keep_window_size` best-scored keys that it may see.

    Key j beats key k when its score is larger, or equal and j > k: among equals the newer key wins. A causal query at
    absolute position `p = q + key_len - query_len` selects among the keys 0 to p, any other among all keys. With
    causality that makes a key visible to one interval of positions, `[k, end[k])`: one number per key is all of it.

    Made by `DynamicMask.from_score`, and passed as `attn_mask`. A causal mask makes the call causal.

    Attributes:
        end: (batch, heads, key_len) int32, the first absolute position that no longer sees the key.
        keep_window_size: the most keys that a query sees.
        is_causal: whether queries select among the keys up to their own position only.
    """

    def __init__(
        self, end: Tensor, keep_window_size: int, *, is_causal: bool, query_len: int, survivors: Tensor | None = None
    ) -> None:
        self.end = end
        # What a GPU makes its key lists from: (batch, heads, chunks, slots) int32; empty where there are none.
        self.survivors = end.new_empty((*end.shape[:2], 0, 0)) if survivors is None else survivors
        self.keep_window_size = keep_window_size
        self.is_causal = is_causal
        self.query_len = query_len

    @classmethod
    def from_score(
        cls,
        score: Tensor,
        keep_window_size: int,
        *,
        is_causal: bool = True,
        query_len: int | None = None,
        key_padding_mask: Tensor | None = None,
    ) -> DynamicMask:
        """Selects by score, which gets no gradient. O(K log w) time, O(K) memory.

        Args:
            score: (batch, 1 | kv_heads | heads, key_len), floating. NaN ranks lowest.
            keep_window_size: how many keys a query keeps, at least 1.
            is_causal: select among the keys up to the query's position; else among all.
            query_len: the queries are the last `query_len` positions; None: key_len.
            key_padding_mask: (batch | 1, key_len), bool or numbers, where False or 0 is padding: never visible, and it
                takes no other key's place.

        Raises:
            TypeError, ValueError: naming the argument that fits no rule; with FLASH_DMATTN_CHECK=1 also for NaN scores.
        """
        checks.check_score(score, key_padding_mask)
        checks.check_count("keep_window_size", keep_window_size, least=1)
        checks.check_flag("is_causal", is_causal)
        if query_len is None:
            query_len = score.size(2)
        checks.check_count("query_len", query_len, least=0)
        if key_padding_mask is not None and key_padding_mask.dtype != torch.bool:
            key_padding_mask = key_padding_mask != 0
        end, survivors = make_dynamic_mask(
            score.detach(), key_padding_mask, keep_window_size, query_len, bool(is_causal)
        )
        return cls(end, keep_window_size, is_causal=bool(is_causal), query_len=query_len, survivors=survivors)

    @property
    def shape(self) -> torch.Size:
        """(batch, heads, query_len, key_len)."""
        batch, heads, key_len = self.end.shape
        return torch.Size((batch, heads, self.query_len, key_len))

    def _first_position(self) -> int:
        return self.end.size(2) - self.query_len

    def to_dense(self) -> Tensor:
        """The mask as (batch, heads, query_len, key_len) bool, True where visible: for tests and pictures."""
        key_len = self.end.size(2)
        position = torch.arange(self._first_position(), key_len, device=self.end.device)[:, None]
        visible = position < self.end[:, :, None, :]
        if self.is_causal:
            visible = visible & (torch.arange(key_len, device=self.end.device) <= position)
        return visible

    def density(self) -> float:
        """Visible pairs of query and key, as a share of the pairs that attention without the dynamic mask would see.

        O(K), from `end` alone. 0.0 where there are no pairs.
        """
        batch, heads, key_len = self.end.shape
        if self.is_causal:
            key = torch.arange(key_len, device=self.end.device)
            first = key.clamp(min=self._first_position())
        else:
            first = torch.full((key_len,), self._first_position(), device=self.end.device)
        pairs = batch * heads * int((key_len - first).sum())
        visible = int((self.end.clamp(max=key_len) - first).clamp(min=0).sum())
        return visible / pairs if pairs else 0.0

    def __repr__(self) -> str:
        return (
            f"DynamicMask(shape={tuple(self.shape)}, keep_window_size={self.keep_window_size}, "
            f"is_causal={self.is_causal}, device={self.end.device})"
        )
