"""PyTorch's FlexAttention."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import checks, operators
from ..problem import Problem
from . import cpu


def _find_missing() -> str | None:
    missing = None
    # The compiler that inductor takes, and the instruction sets that FlexAttention has CPU kernels for.
    compiler = os.environ.get("CXX", "g++")
    if importlib.util.find_spec("torch.nn.attention.flex_attention") is None:
        missing = f"torch {torch.__version__} has no FlexAttention"
    elif shutil.which(compiler) is None and not torch.cuda.is_available():
        missing = f"it compiles its kernels, and there is no C++ compiler {compiler} (CXX names another)"
    elif not torch.backends.cpu.get_cpu_capability().startswith("AVX") and not torch.cuda.is_available():
        missing = "FlexAttention runs on CPUs with AVX2 and on GPUs"
    return missing and f"the flex backend is missing: {missing}; use flash_dmattn_func for CPU tensors"


DEVICES = ("cpu", "cuda")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MISSING: str | None = _find_missing()


def attention(problem: Problem) -> Tensor:
    if problem.query.is_cuda:
        return attention_with_lse(problem)[0]
    checks.check_dtype("query", problem.query, DTYPES)
    return _CPUAttention.apply(*problem)


def attention_with_lse(problem: Problem) -> tuple[Tensor, Tensor]:
    checks.check_dtype("query", problem.query, DTYPES)
    if problem.query.is_cuda:
        return _flex_attention(problem, return_lse=True)
    # On the CPU FlexAttention has no lse to give.
    return _CPUAttention.apply(*problem), operators.forward(*problem)[1]


def probabilities(problem: Problem, lse: Tensor) -> Tensor:
    if problem.query.is_cuda:
        raise ValueError("return_attn_probs is True; on CUDA tensors the flex backend takes False or None")
    return cpu.probabilities(problem, lse)


class _CPUAttention(torch.autograd.Function):
    """FlexAttention forward, which on the CPU refuses tensors that require gradients; the engine backward."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        problem = Problem(*arguments)
        ctx.save_for_backward(*arguments[:7])
        ctx.options = arguments[7:]
        bias = None if problem.bias is None else problem.bias.detach()
        return _flex_attention(
            problem._replace(
                query=problem.query.detach(), key=problem.key.detach(), value=problem.value.detach(), bias=bias
            ),
            return_lse=False,
        )

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *masks = ctx.saved_tensors  # mask, bias, end, survivors
        out, lse = operators.forward(query, key, value, *masks, *ctx.options)
        needs_bias_grad = ctx.needs_input_grad[4]
        *grads, grad_bias = operators.backward(
            grad_out.contiguous(), None, query, key, value, out, lse, *masks, *ctx.options, needs_bias_grad
        )
        return *grads, None, grad_bias if needs_bias_grad else None, *[None] * 6


def _flex_attention(problem: Problem, *, return_lse: bool) -> Any:
    """out (B, Q, H, D), and lse (B, H, Q) if asked for."""
    query, key, value, mask, bias, end, _, scale, softcap, is_causal, _ = problem
    if query.numel() == 0 or key.numel() == 0:
        out = torch.zeros_like(query)
        lse = torch.full((query.size(0), query.size(2), query.size(1)), -math.inf, device=query.device)
        return (out, lse) if return_lse else out
    attention = _compiled(query.device.type)
    # Every combination of features, dtypes and shapes is a kernel of its own: many more than the usual limits.
    limits = {"recompile_limit": 2**20, "accumulated_recompile_limit": 2**20}
    with contextlib.nullcontext() if torch.compiler.is_compiling() else torch._dynamo.config.patch(limits):
        result = attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            mask,
            bias,
            end,
            # As tensors: FlexAttention takes no number that the compiler has made variable.
            torch.full((), scale, device=query.device),
            torch.full((), softcap, device=query.device) if softcap else None,
            is_causal,
            return_lse,
        )
    return (result[0].transpose(1, 2), result[1]) if return_lse else result.transpose(1, 2)


@functools.cache
def _compiled(device: str) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        bias: Tensor | None,
        end: Tensor | None,
        scale: Tensor,
        softcap: Tensor | None,
        is_causal: bool,
        return_lse: bool,
    ) -> Any:
        heads, query_len, key_len = query.size(1), query.size(2), key.size(2)

        def at(tensor: Tensor, b: Tensor, h: Tensor, *rest: Tensor) -> Tensor:
            """tensor[b, h, *rest], where dimensions of size 1 broadcast, and KV heads stand for their query heads."""
            index = (b, h // (heads // tensor.size(1)), *rest)
            return tensor[tuple(i if size > 1 else i * 0 for i, size in zip(index, tensor.shape, strict=True))]

        def is_visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            position = q + (key_len - query_len)
            visible = k <= position if is_causal else k >= 0
            if mask is not None:
                visible = visible & at(mask, b, h, q, k)
            if end is not None:
                visible = visible & (position < at(end, b, h, k))
            return visible

        def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            score = score * scale
            if softcap is not None:
                score = softcap * torch.tanh(score / softcap)
            if bias is not None:
                score = score + at(bias, b, h, q, k)
            return score

        masks = [tensor for tensor in (mask, end) if tensor is not None]
        block_mask = None
        if masks or is_causal:
            batch = query.size(0) if any(tensor.size(0) > 1 for tensor in masks) else None
            mask_heads = heads if any(tensor.size(1) > 1 for tensor in masks) else None
            block_mask = create_block_mask(is_visible, batch, mask_heads, query_len, key_len, device=query.device)
        result: Any = flex_attention(
            query,
            key,
            value,
            score_mod=score_mod,
            block_mask=block_mask,
            scale=1.0,
            enable_gqa=True,
            return_aux=AuxRequest(lse=True) if return_lse else None,
        )
        return (result[0], result[1].lse) if return_lse else result

    # For some variable shapes FlexAttention's CPU kernels are not valid C++.
    return torch.compile(attention, fullgraph=True, dynamic=False if device == "cpu" else None)
