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
from . import cpu, plain
from .tiles import BLOCK, Blocks, Tiles, make_blocks, make_tiles, rows_of


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
    return _attention(problem, needs_lse=False)[0]


def attention_with_lse(problem: Problem) -> tuple[Tensor, Tensor]:
    out, lse = _attention(problem, needs_lse=True)
    assert lse is not None
    return out, lse


def probabilities(problem: Problem, lse: Tensor) -> Tensor:
    return _probabilities(problem, lse) if problem.query.is_cuda else cpu.probabilities(problem, lse)


def _attention(problem: Problem, *, needs_lse: bool) -> tuple[Tensor, Tensor | None]:
    checks.check_dtype("query", problem.query, DTYPES)
    query, key, value, _, bias, *_ = problem
    if query.numel() == 0 or key.numel() == 0:
        # Constants, with gradients all the same.
        zero = sum(x[..., :0].sum() for x in (query, key, value, bias) if x is not None)
        lse = query.new_full((query.size(0), query.size(2), query.size(1)), -math.inf, dtype=torch.float32)
        return torch.zeros_like(query) + zero, lse + zero
    if query.is_cuda:
        return _flex_attention(problem)
    needs_grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (query, key, value, bias))
    return _cpu_attention(*problem) if needs_lse or needs_grad else _on_cpu(problem)


@torch.no_grad()  # in every case, as a kernel is compiled for either
def _on_cpu(problem: Problem) -> tuple[Tensor, Tensor | None]:
    """FlexAttention, which on the CPU refuses tensors that require gradients and gives no lse."""
    return _flex_attention(problem.detach())


def _with_lse(*arguments: Any) -> tuple[Tensor, Tensor]:
    problem = Problem(*arguments)
    return _on_cpu(problem)[0], operators.forward(*problem.detach())[1]


# The lse and the backward pass are the engine's.
_cpu_attention = operators.with_gradients(_with_lse, operators.backward)


def _flex_attention(problem: Problem) -> tuple[Tensor, Tensor | None]:
    """out (B, Q, H, D), and on GPUs lse (B, H, Q)."""
    tiles, cut = make_tiles(problem)
    needs_grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tiles)
    blocks = make_blocks(tiles, cut, backward=needs_grad)
    bias, scale, softcap = tiles.bias, problem.scale, problem.softcap
    if problem.deterministic and needs_grad and bias is not None and bias.requires_grad:
        # What FlexAttention captures gets its gradient by atomic additions.
        tiles = tiles._replace(bias=bias.detach())
        out, lse = _run(tiles, blocks, scale, softcap)
        out, lse = plain.DeterministicBiasGradient.apply(out, lse, bias, tiles, scale, softcap)
    else:
        out, lse = _run(tiles, blocks, scale, softcap)
    out = rows_of(out, cut)[..., : problem.query.size(3)]
    return out, None if lse is None else rows_of(lse, cut).transpose(1, 2)


def _probabilities(problem: Problem, lse: Tensor) -> Tensor:
    tiles, cut = make_tiles(problem._replace(survivors=None).detach())  # all keys, in their order
    padded = lse.new_full(tiles.query.shape[:3], -math.inf)
    padded[: cut.batch, :, : cut.query_len] = lse.detach()
    probs = plain.probabilities(tiles, padded, problem.scale, problem.softcap)
    return probs[: cut.batch, :, : cut.query_len, : problem.key.size(1)].contiguous()


def _run(tiles: Tiles, blocks: Blocks, scale: float, softcap: float) -> tuple[Tensor, Tensor | None]:
    """out (T, H, Q, D), and on GPUs lse (T, H, Q), by the compiled kernels."""
    # As tensors: another number is not another kernel.
    numbers = (
        torch.full((), scale, device=tiles.query.device),
        (torch.full((), softcap, device=tiles.query.device) if softcap else None),
    )
    # A combination of features, dtypes and (rounded) sizes is a kernel of its own: more than the usual limits.
    limits = {"recompile_limit": 2**20, "accumulated_recompile_limit": 2**20}
    with contextlib.nullcontext() if torch.compiler.is_compiling() else torch._dynamo.config.patch(limits):
        result: tuple[Tensor, Tensor | None] = _compiled()(tiles, blocks, *numbers)
    return result


@functools.cache
def _compiled() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

    def attention(tiles: Tiles, blocks: Blocks, scale: Tensor, softcap: Tensor | None) -> Any:
        query, key, value, start, end, mask, bias = tiles
        heads = query.size(1)

        def at(tensor: Tensor, t: Tensor, h: Tensor, *rest: Tensor) -> Tensor:
            """tensor[t, h, *rest], where dimensions of size 1 broadcast, and KV heads stand for their query heads."""
            index = (t, h // (heads // tensor.size(1)), *rest)
            return tensor[tuple(i if size > 1 else i * 0 for i, size in zip(index, tensor.shape, strict=True))]

        def is_visible(t: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            visible = (at(start, t, h, k) <= q) & (q < at(end, t, h, k))
            return visible if mask is None else visible & at(mask, t, h, q, k)

        def score_mod(score: Tensor, t: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            score = score * scale
            if softcap is not None:
                score = softcap * torch.tanh(score / softcap)
            if bias is not None:
                score = score + at(bias, t, h, q, k)
            return score

        # Tiles of a mask or bias with a value per pair are staged in shared memory, too, which three stages overflow.
        has_pairs = any(pairs is not None and pairs.size(2) > 1 and pairs.size(3) > 1 for pairs in (mask, bias))
        options: Any = {"num_stages": 2 if query.size(3) <= 128 else 1} if has_pairs and query.is_cuda else None
        sizes = query.size(2), key.size(2)
        block_mask = BlockMask(sizes, *blocks, BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=is_visible)
        result: Any = flex_attention(
            query,
            key,
            value,
            score_mod=score_mod,
            block_mask=block_mask,
            scale=1.0,
            enable_gqa=True,
            kernel_options=options,
            return_aux=AuxRequest(lse=True) if query.is_cuda else None,
        )
        return (result[0], result[1].lse) if query.is_cuda else (result, None)

    # Its CPU kernels are not valid C++ for variable sizes.
    return torch.compile(attention, fullgraph=True, dynamic=False)
