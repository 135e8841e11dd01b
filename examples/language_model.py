"""A small language model of bytes in the style of Doge, with dynamic mask attention in every layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flash_dmattn.integrations.flash_dynamic_mask_attention import flash_dynamic_mask_attention_forward


@dataclass
class Config:
    vocab_size: int = 256
    hidden_size: int = 192
    intermediate_size: int = 512
    num_hidden_layers: int = 2
    num_attention_heads: int = 6
    num_key_value_heads: int = 3
    keep_window_size: int = 128
    rope_theta: float = 10000.0

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


class KeyValueCache:
    """All keys and values so far, with the interface of a transformers `Cache`, and what `TokenShift` needs."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        self.shifts: dict[TokenShift, Tensor] = {}

    def update(self, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        if layer_idx in self.layers:
            old_key, old_value = self.layers[layer_idx]
            key, value = torch.cat((old_key, key), dim=2), torch.cat((old_value, value), dim=2)
        self.layers[layer_idx] = key, value
        return key, value

    def get_seq_length(self) -> int:
        return self.layers[0][0].shape[2] if self.layers else 0


class DynamicMaskAttention(nn.Module):
    """Each key has one learned score per KV head. A query sees the `keep_window_size` best-scored keys before it, and
    the score is added to the logits, which is how it is learned.
    """

    is_causal = True

    def __init__(self, config: Config, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.keep_window_size = config.keep_window_size
        self.attention: Callable = flash_dynamic_mask_attention_forward
        key_value_size = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_value_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key_value_size, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, config.hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(self.head_dim)
        self.k_norm = nn.RMSNorm(self.head_dim)
        # With A = 0 all scores are equal and the newest keys win: training starts from a sliding window.
        self.A = nn.Parameter(torch.zeros(config.num_key_value_heads))
        self.dt_proj = nn.Linear(key_value_size, config.num_key_value_heads, bias=False)

    def score(self, value: Tensor) -> Tensor:
        """`(B, Hk, K)` from the values of all heads `(B, K, Hk * D)`."""
        return torch.exp(self.A * F.softplus(self.dt_proj(value))).transpose(1, 2)

    def forward(self, hidden: Tensor, rotation: tuple[Tensor, Tensor], cache: KeyValueCache | None = None) -> Tensor:
        batch, length, _ = hidden.shape
        query, key, value = (
            project(hidden).view(batch, length, -1, self.head_dim).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = (rotate(norm(x.float()), *rotation) for norm, x in ((self.q_norm, query), (self.k_norm, key)))
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        score = self.score(value.transpose(1, 2).flatten(2))
        bias = score[:, :, None, :].expand(-1, -1, length, -1)
        output, _ = self.attention(self, query, key, value, attention_mask=None, attention_bias=bias)
        return self.o_proj(output.flatten(2))


class TokenShift(nn.Module):
    """Adds to each position a learned mixture of the few before it. The best-scored keys are seldom the newest ones, so
    this is how a byte knows its neighbours, and attention is free to look far.
    """

    def __init__(self, hidden_size: int, reach: int = 3) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(reach, hidden_size).normal_(std=0.5))

    def forward(self, hidden: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        batch, length, size = hidden.shape
        reach = len(self.weight)
        past = hidden.new_zeros(batch, reach, size)
        if cache is not None:
            past = cache.shifts.get(self, past)
        extended = torch.cat((past, hidden), dim=1)
        if cache is not None:
            cache.shifts[self] = extended[:, -reach:]
        return hidden + sum(self.weight[i] * extended[:, i : i + length] for i in range(reach))


class Block(nn.Module):
    def __init__(self, config: Config, layer_idx: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden_size)
        self.attention_shift = TokenShift(config.hidden_size)
        self.attention = DynamicMaskAttention(config, layer_idx)
        self.attention_residual = nn.Parameter(torch.ones(config.hidden_size))
        self.mlp_norm = nn.RMSNorm(config.hidden_size)
        self.mlp_shift = TokenShift(config.hidden_size)
        self.gate_and_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.mlp_residual = nn.Parameter(torch.ones(config.hidden_size))

    def forward(self, hidden: Tensor, rotation: tuple[Tensor, Tensor], cache: KeyValueCache | None = None) -> Tensor:
        attended = self.attention(self.attention_shift(self.attention_norm(hidden), cache), rotation, cache)
        hidden = self.attention_residual * hidden + attended
        gate, up = self.gate_and_up_proj(self.mlp_shift(self.mlp_norm(hidden), cache)).chunk(2, dim=-1)
        return self.mlp_residual * hidden + self.down_proj(F.silu(gate) * up)


class LanguageModel(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer_idx) for layer_idx in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2 and "shift" not in name:
                # What is added to the residual stream starts smaller, the more layers add to it.
                adds = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * config.num_hidden_layers) ** 0.5 if adds else 0.02)

    def forward(self, tokens: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Logits `(B, N, vocab_size)` of the token after each of `tokens` `(B, N)`."""
        start = 0 if cache is None else cache.get_seq_length()
        rotation = self.rotation(start, tokens.shape[1], tokens.device)
        hidden = self.embedding(tokens)
        for layer in self.layers:
            hidden = layer(hidden, rotation, cache)
        return F.linear(self.norm(hidden), self.embedding.weight)

    def rotation(self, start: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosine and sine `(N, D)` of the rotary position embedding."""
        half = torch.arange(0, self.config.head_dim, 2, device=device, dtype=torch.float32) / self.config.head_dim
        angle = torch.arange(start, start + length, device=device)[:, None] * self.config.rope_theta**-half
        angle = torch.cat((angle, angle), dim=-1)
        return angle.cos(), angle.sin()

    @torch.inference_mode()
    def generate(self, prompt: Tensor, count: int, temperature: float = 0.7) -> Tensor:
        """`count` tokens sampled after `prompt` `(N,)`."""
        cache, tokens, generated = KeyValueCache(), prompt[None], []
        for _ in range(count):
            probabilities = (self(tokens, cache)[:, -1].float() / temperature).softmax(-1)
            tokens = torch.multinomial(probabilities, 1)
            generated.append(tokens)
        return torch.cat(generated, dim=1)[0]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)
