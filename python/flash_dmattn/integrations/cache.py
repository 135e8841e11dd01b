"""A key-value cache of constant size: under a causal dynamic mask, a key that w better ones beat never returns."""

from __future__ import annotations

from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class DynamicMaskLayer(CacheLayerMixin):
    """The `keep_window_size` best-scored keys of each KV head so far, in the order of their positions."""

    is_sliding = False
    keys: Tensor
    values: Tensor
    scores: Tensor

    def __init__(self, keep_window_size: int) -> None:
        super().__init__()
        self.keep_window_size = keep_window_size
        self.cumulative_length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.scores = self.keys.new_empty(self.keys.shape[:3])
        self.is_initialized = True

    def append(self, keys: Tensor, values: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        self.cumulative_length += keys.shape[2]
        keys = torch.cat((self.keys, keys), dim=2)
        values = torch.cat((self.values, values), dim=2)
        scores = torch.cat((self.scores, scores), dim=2)
        if keys.shape[2] <= self.keep_window_size:
            self.keys, self.values, self.scores = keys, values, scores
        else:
            kept = _best(scores, self.keep_window_size)
            self.keys = keys.gather(2, kept[..., None].expand(-1, -1, -1, keys.shape[3]))
            self.values = values.gather(2, kept[..., None].expand(-1, -1, -1, values.shape[3]))
            self.scores = scores.gather(2, kept)
        return keys, values, scores

    def update(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError(
            "DynamicMaskCache needs the scores of the keys: use it in a model that calls its append(), "
            "such as one from flash_dmattn.integrations.doge.patch_doge"
        )

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """A mask is wanted for the new keys alone: what is kept was visible when it came."""
        if isinstance(query_length, Tensor):  # transformers 4 passes the positions
            query_length = query_length.shape[0]
        return query_length, self.cumulative_length

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name in transformers 4

    def offload(self) -> None:
        super().offload()
        if self.is_initialized:
            self.scores = self.scores.to("cpu", non_blocking=True)

    def prefetch(self) -> None:
        super().prefetch()
        if self.is_initialized:
            self.scores = self.scores.to(self.device, non_blocking=True)

    def reset(self) -> None:
        self.is_initialized = False
        self.cumulative_length = 0

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove != 0:
            raise ValueError("DynamicMaskCache cannot be cropped: the keys that were evicted since are gone")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.is_initialized:
            indices = indices.to(self.keys.device)
            self.keys, self.values, self.scores = self.keys[indices], self.values[indices], self.scores[indices]

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self.batch_select_indices(torch.arange(self.keys.shape[0]).repeat_interleave(repeats))


class DynamicMaskCache(Cache):
    """A transformers `Cache` that keeps at most `keep_window_size` rows per KV head and layer, for any context length.

    The output is that of a full cache: what is evicted would never have been visible again. Pass it as
    `past_key_values` (from transformers 5.24 on as `cache`) to `generate()` or `forward()` of a model from
    `flash_dmattn.integrations.doge.patch_doge`.

    It cannot be cropped, which assisted generation needs.

    Raises:
        ValueError: `keep_window_size` is not a positive integer.
    """

    def __init__(self, keep_window_size: int) -> None:
        if not isinstance(keep_window_size, int) or keep_window_size < 1:
            raise ValueError(f"keep_window_size must be a positive integer, got {keep_window_size!r}")
        super().__init__(layer_class_to_replicate=partial(DynamicMaskLayer, keep_window_size))

    def append(self, keys: Tensor, values: Tensor, scores: Tensor, layer_idx: int) -> tuple[Tensor, Tensor, Tensor]:
        """Adds the keys of new positions, and evicts what the dynamic mask will hide from all later queries.

        Args:
            keys, values: `(B, Hk, Q, D)`.
            scores: `(B, Hk, Q)`; `-inf` for padding, which is evicted first.
            layer_idx: The layer they belong to.

        Returns:
            Keys, values and scores that the new queries attend to: those kept so far, then the new ones. With the
            scores as bias and as score of a causal dynamic mask, it is attention over all keys ever seen.
        """
        while len(self.layers) <= layer_idx:
            self.layers.append(self.layer_class_to_replicate())
        return self.layers[layer_idx].append(keys, values, scores)


def _best(scores: Tensor, count: int) -> Tensor:
    """The ascending positions of the `count` largest of `scores` `(..., K)`; among equals the later one is larger."""
    scores = scores.masked_fill(scores.isnan(), -torch.inf)
    surplus = scores.shape[-1] - count
    if surplus == 1:  # one token was generated: argmin gives the first of equals, the one to go
        kept = torch.arange(count, device=scores.device)
        return kept + (kept >= scores.argmin(-1, keepdim=True))
    return scores.argsort(dim=-1, stable=True)[..., surplus:].sort(-1).values
