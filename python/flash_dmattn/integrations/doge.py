"""The attention of transformers' Doge models in O(N w)."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.models.doge.modeling_doge import DogeAttention, apply_rotary_pos_emb

from flash_dmattn.integrations import attention_interface
from flash_dmattn.integrations.cache import DynamicMaskCache
from flash_dmattn.integrations.flash_dynamic_mask_attention import flash_dynamic_mask_attention_forward

Model = TypeVar("Model", bound=nn.Module)


class DynamicMaskDogeAttention(DogeAttention):
    """`DogeAttention` with the same parameters. Beside causality and padding, it makes nothing of size Q x K."""

    is_causal = True

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        *,
        cache: Cache | None = None,  # its name from transformers 5.24 on
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        cache = past_key_values if cache is None else cache
        batch_and_length = hidden_states.shape[:-1]
        per_head = (*batch_and_length, -1, self.head_dim)
        query = self.q_norm(self.q_proj(hidden_states).view(per_head)).transpose(1, 2)
        key = self.k_norm(self.k_proj(hidden_states).view(per_head)).transpose(1, 2)
        value = self.v_proj(hidden_states).view(per_head).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)

        if isinstance(cache, DynamicMaskCache):
            score = self.score(value)
            if attention_mask is not None:
                if attention_mask.dim() != 2:
                    raise ValueError("DynamicMaskCache needs a causal mask, beside which there is only padding")
                score = score.masked_fill(~attention_mask[:, None, :], -torch.inf)
                attention_mask = None
            key, value, score = cache.append(key, value, score, self.layer_idx)
        else:
            if cache is not None:
                position = kwargs.get("cache_position")  # for the static cache of transformers 4
                more = () if position is None else ({"cache_position": position},)
                key, value = cache.update(key, value, self.layer_idx, *more)
            score = self.score(value)

        output, _ = flash_dynamic_mask_attention_forward(
            self,
            query,
            key,
            value,
            attention_mask,
            attention_bias=score[:, :, None, :],
            scaling=self.scaling,
            dropout=self.attention_dropout if self.training else 0.0,
        )
        return self.o_proj(output.reshape(*batch_and_length, -1)), None

    def score(self, value: Tensor) -> Tensor:
        """How much each key `(B, Hk, K)` matters, from `value` `(B, Hk, K, D)`."""
        raw = self.dt_proj(value.transpose(1, 2).flatten(2))
        return torch.exp(self.A * nn.functional.softplus(raw)).transpose(1, 2)


def patch_doge(model: Model) -> Model:
    """Makes a Doge model of transformers run in O(N w), in place: the same weights, the same `state_dict`.

    Outputs are those of transformers' own attention, but for two things. Among equal scores the newer key wins, where
    `torch.topk` leaves it open: it matters for untrained models, whose scores are all equal, and for half precision.
    And a query that sees no key, which only padding does not, gives 0 instead of an average of all values.

    Args:
        model: `DogeForCausalLM` or any module with `DogeAttention` inside.

    Returns:
        `model`.

    Raises:
        TypeError: `model` has no `DogeAttention`.
    """
    attentions = [module for module in model.modules() if isinstance(module, DogeAttention)]
    if not attentions:
        raise TypeError(f"model must contain transformers' DogeAttention, got {type(model).__name__}, which has none")
    attention_interface.register()
    for attention in attentions:
        attention.__class__ = DynamicMaskDogeAttention
        attention.config._attn_implementation = attention_interface.DYNAMIC_MASK_NAME
    return model
