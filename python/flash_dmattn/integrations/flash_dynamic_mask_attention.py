"""Attention as the modules of transformers call it: heads first, with masks of several kinds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flash_dmattn import flash_dmattn_func_auto

# Additive masks hold 0 and the lowest value of some dtype, or sums of those, or an old-style -10000.
_LARGEST_MASKED = -1e4


def flash_dynamic_mask_attention_forward(
    module: nn.Module | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    attention_bias: Tensor | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attends, each query to its `keep_window_size` best-scored keys where there are more keys than that.

    Args:
        module: The attention module. Its `is_causal` and `keep_window_size` are the defaults of the keyword arguments.
        query: `(B, H, Q, D)`.
        key, value: `(B, Hk, K, D)`, read in place like the query: transposed views cost nothing.
        attention_mask: What may be seen: boolean or integer (not 0 is visible), or floating in transformers' additive
            convention (0 is visible, the dtype's lowest value is masked). `(B, K)`, or `(B | 1, 1 | Hk | H, 1 | Q, K)`.
            A mask that is only causality and padding costs O(Q K) to recognise and nothing after that. With any other
            mask of a row per query, the best of each row's visible keys are selected, which is O(Q K) work.
        attention_bias: `(B | 1, 1 | Hk | H, 1 | Q, K)`, added to the logits. It is also the score by which keys are
            selected, in O(K) where it belongs to the key alone (size 1, or expanded, over the queries).
        scaling: Factor of `query · key`, by default `1/sqrt(D)`. `scale=` is another name for it.
        softcap: Logits become `softcap · tanh(logits / softcap)`, before the bias.
        **kwargs: `is_causal` (else the module's, else True), `keep_window_size` (else the module's, else no dynamic
            mask), `implementation` ("flash_dmattn" or None is the best backend; or a backend's name), `dropout`
            (only 0). Others that transformers passes, such as `layer_idx`, are not looked at.

    Returns:
        `(B, Q, H, D)` in the query's dtype, and None where other implementations have the attention weights.

    Raises:
        ValueError: An argument fits no rule; the message names it.
        ImportError: The backend that `implementation` names cannot run here.
    """
    if "scale" in kwargs:
        if scaling is not None:
            raise ValueError("scale and scaling are two names of one argument: give one of them")
        scaling = kwargs["scale"]
    if kwargs.get("dropout"):
        raise ValueError(f"dropout must be 0, got {kwargs['dropout']}: attention weights are never materialized")
    is_causal = _option(kwargs, module, "is_causal", default=True)
    keep_window_size = _option(kwargs, module, "keep_window_size", default=None)
    if keep_window_size is not None and key.shape[2] <= keep_window_size:
        keep_window_size = None
    if keep_window_size is not None and attention_bias is None:
        raise ValueError("attention_bias must be given where keep_window_size is: it scores the keys")

    mask = None if attention_mask is None else visible(attention_mask)
    if mask is not None and mask.shape[2] > 1 and mask.shape[2:] == (query.shape[2], key.shape[2]):
        padding = causal_padding(mask)
        if padding is not None:
            mask = None if padding.all() else padding
            is_causal = True

    implementation = kwargs.get("implementation")
    attention = flash_dmattn_func_auto(backend=None if implementation == "flash_dmattn" else implementation)
    output = attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=mask,
        attn_bias=attention_bias,
        scale=scaling,
        is_causal=bool(is_causal),
        softcap=softcap,
        keep_window_size=keep_window_size,
    )
    return output, None


def visible(attention_mask: Tensor) -> Tensor:
    """The mask as booleans `(B, heads, Q, K)`, with size 1 in place of the dimensions that were expanded."""
    if attention_mask.dim() == 2:
        attention_mask = attention_mask[:, None, None, :]
    if attention_mask.dim() != 4:
        raise ValueError(
            "attention_mask must have shape (batch, key_len) or (batch, heads, query_len, key_len), "
            f"got {tuple(attention_mask.shape)}"
        )
    for dim in range(3):
        if attention_mask.stride(dim) == 0 and attention_mask.shape[dim] > 1:
            attention_mask = attention_mask.narrow(dim, 0, 1)
    if not attention_mask.is_floating_point():
        return attention_mask if attention_mask.dtype == torch.bool else attention_mask != 0
    mask = attention_mask == 0
    if not (mask | (attention_mask <= _LARGEST_MASKED)).all():
        raise ValueError(
            "attention_mask of a floating dtype must be additive: 0 where visible, the lowest value where masked; "
            "got other values, which belong into attention_bias (or make the mask boolean)"
        )
    return mask


def causal_padding(mask: Tensor) -> Tensor | None:
    """The padding mask `(B, 1, 1, K)` where boolean `mask` `(B, h, Q, K)` is causality and padding alone, else None.

    Causality leaves everything to the last query, so its row is the padding, if the mask is of this kind at all.
    """
    query_len, key_len = mask.shape[2:]
    padding = mask[:, :1, -1:]
    expected = padding.expand(-1, -1, query_len, -1).tril(key_len - query_len)
    return padding if torch.equal(mask, expected.expand_as(mask)) else None


def _option(kwargs: dict[str, Any], module: nn.Module | None, name: str, default: Any) -> Any:
    value = kwargs.get(name)
    return getattr(module, name, default) if value is None else value
