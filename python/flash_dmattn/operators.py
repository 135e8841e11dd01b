"""The library's PyTorch operators, `torch.ops.flash_dmattn.*`, with what the compiler and autograd need of them.

Their arguments are those of include/flash_dmattn/attention.h and dynamic_mask.h.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

torch.ops.load_library(Path(__file__).with_name("_C.so"))

forward = torch.ops.flash_dmattn.forward
backward = torch.ops.flash_dmattn.backward
probabilities = torch.ops.flash_dmattn.probabilities
dynamic_mask_end = torch.ops.flash_dmattn.dynamic_mask_end
select_keys = torch.ops.flash_dmattn.select_keys
cpu_instruction_set = torch.ops.flash_dmattn.cpu_instruction_set


@torch.library.register_fake("flash_dmattn::forward")
def _(query: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    batch, query_len, heads, _ = query.shape
    lse_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty(query.shape), query.new_empty((batch, heads, query_len), dtype=lse_dtype)


@torch.library.register_fake("flash_dmattn::backward")
def _(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, _, _, bias, _, _, _, _, needs_bias_grad = arguments
    grad_bias = bias.new_empty(bias.shape) if needs_bias_grad else query.new_empty((0,))
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape), grad_bias


@torch.library.register_fake("flash_dmattn::probabilities")
def _(query: Tensor, key: Tensor, *arguments: Any) -> Tensor:
    batch, query_len, heads, _ = query.shape
    return query.new_empty((batch, heads, query_len, key.size(1)))


@torch.library.register_fake("flash_dmattn::dynamic_mask_end")
def _(score: Tensor, *arguments: Any) -> Tensor:
    return score.new_empty(score.shape, dtype=torch.int32)


@torch.library.register_fake("flash_dmattn::select_keys")
def _(score: Tensor, *arguments: Any) -> Tensor:
    return score.new_empty(score.shape, dtype=torch.bool)


# Without kernels of its own, a GPU has its masks made by the CPU.
@torch.library.register_kernel("flash_dmattn::dynamic_mask_end", "cuda")
def _(score: Tensor, key_padding_mask: Tensor | None, *options: Any) -> Tensor:
    padding = None if key_padding_mask is None else key_padding_mask.cpu()
    return dynamic_mask_end(score.cpu(), padding, *options).to(score.device)


@torch.library.register_kernel("flash_dmattn::select_keys", "cuda")
def _(score: Tensor, visible: Tensor | None, *options: Any) -> Tensor:
    return select_keys(score.cpu(), None if visible is None else visible.cpu(), *options).to(score.device)


def _save_for_backward(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale, ctx.softcap, ctx.is_causal = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    query, key, value, mask, bias, end, out, lse = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    needs_bias_grad = ctx.needs_input_grad[4]
    grad_query, grad_key, grad_value, grad_bias = backward(
        grad_out, grad_lse, query, key, value, out, lse, mask, bias, end,
        ctx.scale, ctx.softcap, ctx.is_causal, needs_bias_grad,
    )  # fmt: skip
    return grad_query, grad_key, grad_value, None, grad_bias if needs_bias_grad else None, None, None, None, None


torch.library.register_autograd("flash_dmattn::forward", _backward, setup_context=_save_for_backward)


def _refuse_double_backward(ctx: Any, *grads: Tensor | None) -> NoReturn:
    raise NotImplementedError("flash_dmattn has no double backward: gradients of attention cannot be differentiated")


torch.library.register_autograd("flash_dmattn::backward", _refuse_double_backward)
