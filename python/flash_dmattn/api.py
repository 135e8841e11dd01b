"""The public attention functions: one signature, any backend."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import backends, checks
from .backends import BACKENDS
from .dynamic_mask import DynamicMask
from .problem import autocast_dtype, make_problem


def get_available_backends() -> list[str]:
    """The backends that can run here, best first, of "cuda", "triton", "flex" and "cpu".

    Each is tried once in a process, on a tiny problem; where it compiles kernels, that can take seconds.
    """
    return [name for name in BACKENDS if backends.missing(name) is None]


def flash_dmattn_func_auto(backend: str | None = None) -> Callable[..., Any]:
    """An attention function with the signature of `flash_dmattn_func`.

    Args:
        backend: "cuda", "triton", "flex" or "cpu"; None: what fits the tensors of each call, "cpu" for CPU tensors and
            the first available of "cuda", "triton" and "flex" that takes their dtype for all others.

    Raises:
        ValueError: for a name that is no backend's.
        ImportError: for a backend that is missing.
        Both list what is available, and why the others are not.
    """
    if backend is not None:
        if backend not in BACKENDS:
            names = ", ".join(map(repr, BACKENDS))
            raise ValueError(f"backend is {backend!r}; it takes {names} or None. Backends:\n{backends.describe()}")
        _available(backend)
    return functools.partial(_attention, backend)


def flash_dmattn_func(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | DynamicMask | None = None,
    attn_bias: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    deterministic: bool | None = None,
    return_attn_probs: bool | None = None,
    *,
    keep_window_size: int | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """softmax(scale * query @ key^T + attn_bias, over the visible keys) @ value, by the C++ engine.

    B batch, Q query length, K key length, H query heads, Hk KV heads, D head dim. H is a multiple of Hk, and query head
    h reads KV head h // (H // Hk). Any strides are read in place; the last dimension of query, key and value is
    contiguous.

    Args:
        query: (B, Q, H, D) float16, bfloat16, float32 or float64, D up to 256; on a GPU float16 or bfloat16. Autocast
            applies.
        key: (B, K, Hk, D), the query's dtype and device.
        value: (B, K, Hk, D), the query's dtype and device.
        attn_mask: (B | 1, 1 | Hk | H, 1 | Q, 1 | K), bool or numbers, where True or 1 is visible; or a `DynamicMask`. A
            mask expanded over queries costs no more than the per-key mask that it is.
        attn_bias: (B | 1, 1 | Hk | H, 1 | Q, 1 | K), the query's dtype or float32, added to the scores after softcap.
            -inf masks the key. An expanded bias costs no more than the narrow one that it is, gradient included.
        scale: None: 1 / sqrt(D).
        is_causal: query q sees the keys up to q + K - Q. None: as the DynamicMask says if there is one, else False. A
            causal DynamicMask stays causal whatever is given here.
        softcap: scores become softcap * tanh(scores / softcap); above 0.
        deterministic: the same bits on every run. The CPU engine gives them in any case, with any number of threads; on
            a GPU sums then wait for their turn.
        return_attn_probs: also return what the softmax gave, (B, H, Q, K), for tests. Has no gradient.
        keep_window_size: each query attends to this many keys only, the best by attn_bias of those it may see; among
            equals the newer key wins. O(K) memory for a bias and mask that belong to the key alone (size 1 or expanded
            over queries), a (B, heads, Q, K) mask for others.

    Returns:
        out (B, Q, H, D), the query's dtype. A query that sees no key gives 0.
        With return_attn_probs (out, lse, probs): lse (B, H, Q) float32 (float64 for float64), the natural logarithm of
        the sum that the softmax divides by, -inf where a query sees no key; probs (B, H, Q, K), the query's dtype.

    Raises:
        TypeError, ValueError: naming the argument that fits no rule, what it got and what it takes.
        ImportError: for CUDA tensors where there are no CUDA kernels.
    """
    backend = "cuda" if isinstance(query, Tensor) and query.is_cuda else "cpu"
    return _attention(
        backend, query, key, value, attn_mask, attn_bias, scale, is_causal, softcap, deterministic, return_attn_probs,
        keep_window_size=keep_window_size,
    )  # fmt: skip


def triton_dmattn_func(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | DynamicMask | None = None,
    attn_bias: Tensor | None = None,
    is_causal: bool | None = False,
    scale: float | None = None,
    softcap: float | None = None,
    deterministic: bool | None = None,
    return_attn_probs: bool | None = None,
    *,
    keep_window_size: int | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """`flash_dmattn_func` by Triton kernels, for CUDA tensors in float16, bfloat16 or float32.

    They are compiled and tuned on first use, for each combination of features, which takes seconds; Triton keeps both.
    """
    return _attention(
        "triton", query, key, value, attn_mask, attn_bias, scale, is_causal, softcap, deterministic, return_attn_probs,
        keep_window_size=keep_window_size,
    )  # fmt: skip


def flex_dmattn_func(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | DynamicMask | None = None,
    attn_bias: Tensor | None = None,
    is_causal: bool | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    deterministic: bool | None = None,
    return_attn_probs: bool | None = None,
    *,
    keep_window_size: int | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """`flash_dmattn_func` by PyTorch's FlexAttention.

    It compiles a kernel for each combination of features and of sizes, rounded up to powers of two, on first use.
    Everything is applied: mask, DynamicMask, bias, causality, softcap, grouped heads. float16, bfloat16 and float32
    only. On the CPU, where FlexAttention has neither a backward nor an lse, these are the C++ engine's.
    """
    return _attention(
        "flex", query, key, value, attn_mask, attn_bias, scale, is_causal, softcap, deterministic, return_attn_probs,
        keep_window_size=keep_window_size,
    )  # fmt: skip


def _available(backend: str, device: str | None = None, query: Tensor | None = None, has_bias: bool = True) -> Any:
    missing = backends.missing(backend, device, query, has_bias)
    if missing is not None:
        raise ImportError(f"{missing}. Backends:\n{backends.describe()}")
    return backends.load(backend)


def _best_backend(query: Tensor, has_bias: bool) -> str:
    device = query.device.type
    if device == "cpu":
        return "cpu"
    dtype = autocast_dtype(query, "cuda") if query.is_cuda else query.dtype
    others = BACKENDS[:-1]
    takes = (name for name in others if backends.load(name).MISSING is None and dtype in backends.load(name).DTYPES)
    asked = (*takes, *others)
    return next((name for name in asked if backends.missing(name, device, query, has_bias) is None), "cuda")


def _attention(
    backend: str | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | DynamicMask | None = None,
    attn_bias: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    deterministic: bool | None = None,
    return_attn_probs: bool | None = None,
    *,
    keep_window_size: int | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    # Else under torch.set_default_device each attribute of a tensor would go through Python: 1 us, dozens of times.
    with torch._C.DisableTorchFunction():
        checks.check_flag("deterministic", deterministic)
        checks.check_flag("return_attn_probs", return_attn_probs)
        checks.check_tensors(query, key, value)
        has_bias = attn_bias is not None
        backend = backend or _best_backend(query, has_bias)
        module = _available(backend, "cuda" if query.is_cuda else "cpu", query, has_bias)
        checks.check_backend("query", query, backend, module.DEVICES)
        problem = make_problem(
            query, key, value, attn_mask, attn_bias, scale, is_causal, softcap, deterministic, keep_window_size
        )
    if not return_attn_probs:
        return module.attention(problem)
    out, lse = module.attention_with_lse(problem)
    return out, lse, module.probabilities(problem, lse)
