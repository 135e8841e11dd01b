"""From what a user passes to the one description of attention that every backend reads."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from . import checks
from .dynamic_mask import DynamicMask, make_dynamic_mask, select_keys


class Problem(NamedTuple):
    """Attention, with nothing left to decide. Broadcast dimensions have size 1, whatever they were expanded to.

    visible(q, k) = mask[q, k] and (not is_causal or k <= p) and p < end[k], with p = q + key_len - query_len.
    """

    query: Tensor  # (B, Q, H, D)
    key: Tensor  # (B, K, Hk, D)
    value: Tensor  # (B, K, Hk, D)
    mask: Tensor | None  # (B | 1, 1 | Hk | H, 1 | Q, 1 | K) bool
    bias: Tensor | None  # (B | 1, 1 | Hk | H, 1 | Q, 1 | K), the query's dtype or float32
    end: Tensor | None  # (B | 1, 1 | Hk | H, K) int32
    survivors: Tensor | None  # beside end, what a GPU makes its key lists from; the CPU needs none
    scale: float
    softcap: float  # 0: none
    is_causal: bool
    deterministic: bool  # the same bits on every run

    def detach(self) -> Problem:
        """The same tensors, without gradients."""
        arguments: Any = (x.detach() if isinstance(x, Tensor) else x for x in self)
        return Problem(*arguments)


def make_problem(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | DynamicMask | None,
    attn_bias: Tensor | None,
    scale: float | None,
    is_causal: bool | None,
    softcap: float | None,
    deterministic: bool | None,
    keep_window_size: int | None,
) -> Problem:
    """What `checks.check_tensors` has passed and all other arguments, checked and brought to one form."""
    device = "cuda" if query.is_cuda else "cpu"
    if torch.is_autocast_enabled(device):
        query, key, value = (tensor.to(autocast_dtype(tensor, device)) for tensor in (query, key, value))
    checks.check_inputs(query, key, value)
    checks.check_number("scale", scale, positive=False)
    checks.check_number("softcap", softcap, positive=True)
    checks.check_flag("is_causal", is_causal)
    causal = bool(is_causal)

    bias = mask = dynamic = None
    if attn_bias is not None:
        checks.check_bias(attn_bias, query, key)
        bias = _unexpand_bias(attn_bias)
    if isinstance(attn_mask, DynamicMask):
        checks.check_dynamic_mask(attn_mask, query, key)
        dynamic = attn_mask.end, attn_mask.survivors
        causal = causal or attn_mask.is_causal
    elif attn_mask is not None:
        checks.check_mask(attn_mask, query, key)
        mask = _unexpand(attn_mask)
        mask = mask if mask.dtype == torch.bool else mask != 0

    if keep_window_size is not None:
        checks.check_count("keep_window_size", keep_window_size, least=1)
        if dynamic is not None:
            raise ValueError(
                f"keep_window_size is {keep_window_size}; with a DynamicMask as attn_mask, which has one, it takes None"
            )
        if bias is None:
            raise ValueError(
                f"keep_window_size is {keep_window_size}; without attn_bias, whose values score the keys, it takes None"
            )
        score = _unexpand(bias.detach()) if bias.requires_grad else bias
        checks.check_no_nan("attn_bias", score)
        mask, dynamic = _best_keys(score, mask, keep_window_size, query.size(1), key.size(1), causal)

    end, survivors = dynamic or (None, None)
    scale = query.shape[3] ** -0.5 if scale is None else float(scale)
    softcap = 0.0 if softcap is None else float(softcap)
    return Problem(query, key, value, mask, bias, end, survivors, scale, softcap, causal, bool(deterministic))


def autocast_dtype(tensor: Tensor, device: str) -> torch.dtype:
    """The dtype that the device's matrix products have, in an enabled autocast region; else the tensor's own."""
    if tensor.dtype not in checks.FLOATING or tensor.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return tensor.dtype
    return torch.get_autocast_dtype(device)


def _expanded(tensor: Tensor) -> list[int]:
    """The dimensions that hold one value, repeated (stride 0)."""
    stride = tensor.stride()
    return [dim for dim, size in enumerate(tensor.shape) if stride[dim] == 0 and size > 1] if 0 in stride else []


def _unexpand(tensor: Tensor) -> Tensor:
    """The same values with every expanded dimension at size 1. A view."""
    for dim in _expanded(tensor):
        tensor = tensor.narrow(dim, 0, 1)
    return tensor


def _unexpand_bias(bias: Tensor) -> Tensor:
    """`_unexpand` whose gradient, too, takes the memory of the narrow shape.

    Autograd's way back through the narrow view and the expand would write out a gradient of the expanded shape.
    """
    if not bias.requires_grad or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return _unexpand(bias)  # The compiler fuses the way back.
    expanded = _expanded(bias)
    if not expanded or bias.is_leaf or bias.retains_grad or bias._backward_hooks:
        return bias  # Its gradient is asked for, in its own shape.
    base = bias._base
    if base is None or not base.requires_grad or base.dtype != bias.dtype or not _are_views(bias.grad_fn, base.grad_fn):
        return _unexpand(bias)
    size = [1 if dim in expanded else size for dim, size in enumerate(bias.shape)]
    return base.as_strided(size, bias.stride(), bias.storage_offset())


def _are_views(node: Any, base: Any) -> bool:
    """Whether autograd's nodes from a view to its base are PyTorch's own views, which as_strided stands for."""
    while node is not base and node.next_functions:
        if isinstance(node, BackwardCFunction) or len(node.next_functions) != 1:
            return False
        ((node, _),) = node.next_functions
        if node is None:
            return False
    return True


def _best_keys(
    score: Tensor, mask: Tensor | None, keep_window_size: int, query_len: int, key_len: int, is_causal: bool
) -> tuple[Tensor | None, tuple[Tensor, Tensor] | None]:
    """A mask, or (end, survivors), of the keep_window_size best-scored keys that mask and causality leave visible."""
    if score.size(2) == 1 and (mask is None or mask.size(2) == 1):
        return None, _best_keys_of_all(score, mask, keep_window_size, query_len, key_len, is_causal)
    if mask is not None:
        score, mask = _broadcast(score, mask)
        mask = mask.expand(-1, -1, query_len, key_len)
    return select_keys(score.expand(-1, -1, query_len, key_len), mask, keep_window_size, is_causal), None


def _best_keys_of_all(
    score: Tensor, mask: Tensor | None, keep_window_size: int, query_len: int, key_len: int, is_causal: bool
) -> tuple[Tensor, Tensor]:
    """`_best_keys` of scores and visibility that belong to the key alone: (B, heads, 1, 1 | K)."""
    if mask is not None and (mask.size(1) > 1 or mask.size(0) > score.size(0)):
        # Heads become batches, which have a padding of their own.
        score, mask = _broadcast(score, mask)
        batch, heads, *lengths = score.shape
        score, mask = (x.reshape(batch * heads, 1, *lengths) for x in (score, mask))
        made = _best_keys_of_all(score, mask, keep_window_size, query_len, key_len, is_causal)
        end, survivors = (x.view(batch, heads, *x.shape[2:]) for x in made)
        return end, survivors
    score = score.squeeze(2)
    if score.size(2) != key_len:
        score = score.expand(-1, -1, key_len)
    visible = None if mask is None else mask.squeeze((1, 2)).expand(-1, key_len)
    return make_dynamic_mask(score, visible, keep_window_size, query_len, is_causal)


def _broadcast(score: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Both at one shape, where one may have KV heads and the other query heads."""
    heads = max(score.size(1), mask.size(1))
    score, mask = (
        x if x.size(1) in (1, heads) else x.repeat_interleave(heads // x.size(1), dim=1) for x in (score, mask)
    )
    return torch.broadcast_tensors(score, mask)
