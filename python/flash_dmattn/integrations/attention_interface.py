"""flash_dmattn as an attention implementation of transformers: the attention function and the masks it asks for."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, modeling_utils
from transformers.masking_utils import causal_mask_function, sdpa_mask

from flash_dmattn.integrations.flash_dynamic_mask_attention import flash_dynamic_mask_attention_forward

NAME = "flash_dmattn"
# The masks of models whose own attention makes the dynamic mask. transformers takes every name with "flash" in it for a
# version of Flash Attention, hence the plain name.
DYNAMIC_MASK_NAME = "dynamic_mask"


def register() -> None:
    _load_no_flash_attention_for(NAME)
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask_for_interface)
    AttentionInterface.register(DYNAMIC_MASK_NAME, attention_forward)
    AttentionMaskInterface.register(DYNAMIC_MASK_NAME, padding_mask)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function behind `attn_implementation="flash_dmattn"`. Differs from what it calls where transformers does:
    a mask with a row per query says everything, causality included, and a floating one may hold any bias.
    """
    for name in ("s_aux", "cache"):
        if kwargs.get(name) is not None:
            raise ValueError(f'attn_implementation="{NAME}" has no support for {name}; use another implementation')
    if kwargs.get("attention_bias") is None:
        kwargs["keep_window_size"] = key.shape[2]  # no scores, no dynamic mask, whatever the module says
        kwargs["attention_bias"] = kwargs.pop("position_bias", None)
    if attention_mask is None and kwargs.get("cu_seq_lens_q") is not None:
        attention_mask = _documents(kwargs["cu_seq_lens_q"], query.shape[2])
    elif attention_mask is not None and attention_mask.dim() == 4:
        kwargs["is_causal"] = False
        if attention_mask.is_floating_point():
            bias = kwargs["attention_bias"]
            kwargs["attention_bias"] = attention_mask if bias is None else attention_mask + bias
            attention_mask = None
    return flash_dynamic_mask_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, softcap=softcap, **kwargs
    )


def padding_mask(
    batch_size: int,
    q_length: int = 0,
    kv_length: int = 0,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    cache_position: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask beside causality: None, or the padding `(B, K)`, where that is all; else a boolean `(B, 1, Q, K)`."""
    if cache_position is not None:  # transformers 4
        q_length, q_offset = cache_position.shape[0], int(cache_position[0])
        sizes: dict[str, Any] = {"cache_position": cache_position}
    else:
        sizes = {"q_length": q_length, "q_offset": q_offset}
    # A static cache has room behind the last query, and its offset is a tensor.
    ends_together = not isinstance(q_offset, Tensor) and q_offset + q_length == kv_offset + kv_length
    if mask_function is causal_mask_function and ends_together:
        if attention_mask is None:
            return None
        padding = attention_mask[:, kv_offset : kv_offset + kv_length]
        padding = nn.functional.pad(padding, (0, kv_length - padding.shape[1]))
        return None if padding.all() else padding
    kwargs["allow_is_causal_skip"] = False
    return sdpa_mask(
        batch_size=batch_size,
        kv_length=kv_length,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        **sizes,
        **kwargs,
    )


def attention_mask_for_interface(
    *args: Any, allow_is_causal_skip: bool = True, config: Any = None, **kwargs: Any
) -> Tensor | None:
    """As `padding_mask`, for a model that may want to see causality in the mask."""
    # Doge's own attention merges the mask with its scores; not every version of it asks for the whole mask.
    if not allow_is_causal_skip or getattr(config, "model_type", None) == "doge":
        return sdpa_mask(*args, allow_is_causal_skip=False, config=config, **kwargs)
    return padding_mask(*args, config=config, **kwargs)


def _documents(cu_seq_lens: Tensor, length: int) -> Tensor:
    """The mask `(1, 1, Q, Q)` of packed sequences, each of which sees itself alone."""
    document = torch.bucketize(torch.arange(length, device=cu_seq_lens.device), cu_seq_lens, right=True)
    return (document[:, None] == document[None, :])[None, None]


def _load_no_flash_attention_for(name: str) -> None:
    """transformers 5 loads a Flash Attention package for every name that contains "flash"; there is none for ours."""
    # Once; call before registering the name.
    if name in AttentionInterface().valid_keys():
        return
    load = modeling_utils.lazy_import_flash_attention

    @wraps(load)
    def load_unless_named(implementation: str | None, *args: Any, **kwargs: Any) -> Any:
        return None if implementation == name else load(implementation, *args, **kwargs)

    modeling_utils.lazy_import_flash_attention = load_unless_named
