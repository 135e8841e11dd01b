"""What the public functions take: the one place where an argument is refused, whatever the backend.

Every message names the argument, what it got and what it takes. A wrong type or dtype is a TypeError, anything else a
ValueError.
"""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from torch import Tensor

MAX_HEAD_DIM = 256
STRIDED = torch.strided  # looked up once, as it is asked for in each call
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dict.fromkeys(dtypes))


def check_tensor(name: str, value: Any, ndim: int, layout: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is {type(value).__name__}; it takes a torch.Tensor {layout}")
    if value.layout is not STRIDED:
        raise TypeError(f"{name} has layout {value.layout}; it takes a dense (torch.strided) tensor")
    if value.ndim != ndim:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; it takes {ndim} dimensions {layout}")


def check_dtype(name: str, value: Tensor, dtypes: tuple[torch.dtype, ...], hint: str = "") -> None:
    if value.dtype not in dtypes:
        raise TypeError(f"{name} is {_names((value.dtype,))}; it takes {_names(dtypes)}{hint}")


def check_mask_dtype(name: str, value: Tensor) -> None:
    if value.is_complex():
        raise TypeError(f"{name} is {_names((value.dtype,))}; it takes bool, or numbers: 1 visible, 0 masked")


def check_device(name: str, value: Tensor, device: torch.device, of: str) -> None:
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}; it takes a tensor on {device}, as {of}")


def check_tensors(query: Any, key: Any, value: Any) -> None:
    check_tensor("query", query, 4, "(batch, query_len, heads, head_dim)")
    check_tensor("key", key, 4, "(batch, key_len, kv_heads, head_dim)")
    check_tensor("value", value, 4, "(batch, key_len, kv_heads, head_dim)")


def check_inputs(query: Tensor, key: Tensor, value: Tensor) -> None:
    """query (B, Q, H, D), key and value (B, K, Hk, D)."""
    dtype, device = query.dtype, query.device
    check_dtype("query", query, FLOATING)
    if not (key.dtype == dtype == value.dtype and key.device == device == value.device):
        for name, tensor in (("key", key), ("value", value)):
            check_dtype(name, tensor, (dtype,))
            check_device(name, tensor, device, "query")

    batch, _, heads, head_dim = query.shape
    key_batch, _, kv_heads, key_head_dim = key_shape = key.shape
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"query has head_dim {head_dim}; it takes 1 to {MAX_HEAD_DIM}")
    if key_batch != batch or key_head_dim != head_dim:
        raise ValueError(
            f"key has shape {tuple(key_shape)}; it takes (batch, key_len, kv_heads, head_dim) with "
            f"query's batch {batch} and head_dim {head_dim}"
        )
    if kv_heads == 0 or heads == 0 or heads % kv_heads != 0:
        raise ValueError(f"key has {kv_heads} heads; it takes a number that divides query's {heads}")
    if value.shape != key_shape:
        raise ValueError(f"value has shape {tuple(value.shape)}; it takes key's {tuple(key_shape)}")
    if not (query.stride()[3] == key.stride()[3] == value.stride()[3] == 1) and head_dim > 1:
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            if tensor.stride()[3] != 1:
                raise ValueError(
                    f"{name} has strides {tensor.stride()}; it takes a contiguous last dimension (stride 1), "
                    f"which {name}.contiguous() gives"
                )


def check_shape(name: str, shape: tuple[int, ...], query: Tensor, key: Tensor, *, broadcast: bool = True) -> None:
    """(B | 1, 1 | Hk | H, Q, K), where with `broadcast` Q and K may be 1."""
    batch, query_len, heads, _ = query.shape
    _, key_len, kv_heads, _ = key.shape
    least_q, least_k = (1, 1) if broadcast else (query_len, key_len)
    b, h, q, k = shape
    if not (b in (1, batch) and h in (1, kv_heads, heads) and q in (least_q, query_len) and k in (least_k, key_len)):
        takes = (1, batch), (1, kv_heads, heads), (least_q, query_len), (least_k, key_len)
        wanted = ", ".join(" | ".join(str(size) for size in dict.fromkeys(sizes)) for sizes in takes)
        raise ValueError(f"{name} has shape {tuple(shape)}; it takes (batch, heads, query_len, key_len) = ({wanted})")


def check_mask(mask: Any, query: Tensor, key: Tensor) -> None:
    """A dense attn_mask: any dtype with an order, any strides."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"attn_mask is {type(mask).__name__}; it takes a torch.Tensor or a DynamicMask")
    check_tensor("attn_mask", mask, 4, "(batch, heads, query_len, key_len)")
    check_mask_dtype("attn_mask", mask)
    check_shape("attn_mask", mask.shape, query, key)
    check_device("attn_mask", mask, query.device, "query")


def check_dynamic_mask(mask: Any, query: Tensor, key: Tensor) -> None:
    """A DynamicMask as attn_mask: made for this query and key length."""
    check_shape("attn_mask (a DynamicMask)", mask.shape, query, key, broadcast=False)
    check_device("attn_mask", mask.end, query.device, "query")


def check_bias(bias: Any, query: Tensor, key: Tensor) -> None:
    check_tensor("attn_bias", bias, 4, "(batch, heads, query_len, key_len)")
    check_dtype("attn_bias", bias, (query.dtype, torch.float32))
    check_shape("attn_bias", bias.shape, query, key)
    check_device("attn_bias", bias, query.device, "query")


def check_number(name: str, value: Any, *, positive: bool) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is {type(value).__name__}; it takes a float or None")
    if not abs(value) < math.inf or (positive and value <= 0):
        raise ValueError(f"{name} is {value}; it takes a finite number{' above 0' if positive else ''} or None")


def check_flag(name: str, value: Any) -> None:
    if value is not None and not isinstance(value, bool):
        raise TypeError(f"{name} is {type(value).__name__}; it takes True, False or None")


def check_count(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} is {type(value).__name__}; it takes an int")
    if value < least:
        raise ValueError(f"{name} is {value}; it takes {least} or more")


def check_score(score: Any, key_padding_mask: Any) -> None:
    """score (B, heads, K) floating, key_padding_mask (B | 1, K)."""
    check_tensor("score", score, 3, "(batch, heads, key_len)")
    check_dtype("score", score, FLOATING)
    check_no_nan("score", score)
    if key_padding_mask is not None:
        check_tensor("key_padding_mask", key_padding_mask, 2, "(batch, key_len)")
        check_mask_dtype("key_padding_mask", key_padding_mask)
        check_device("key_padding_mask", key_padding_mask, score.device, "score")
        batch, _, key_len = score.shape
        if key_padding_mask.size(0) not in (1, batch) or key_padding_mask.size(1) != key_len:
            raise ValueError(
                f"key_padding_mask has shape {tuple(key_padding_mask.shape)}; "
                f"it takes (batch, key_len) = (1 | {batch}, {key_len}), as score"
            )


def check_no_nan(name: str, score: Tensor) -> None:
    """Only where FLASH_DMATTN_CHECK=1: it reads every score, and waits for the device."""
    # A compiled graph cannot raise for what is in a tensor.
    if torch.compiler.is_compiling() or os.environ.get("FLASH_DMATTN_CHECK") != "1":
        return
    if score.isnan().any():
        raise ValueError(f"{name} holds NaN; it takes numbers that can be compared")


def check_backend(name: str, value: Tensor, backend: str, devices: tuple[str, ...]) -> None:
    # Not device.type, which makes a string each time.
    if not ((value.is_cuda and "cuda" in devices) or (value.is_cpu and "cpu" in devices)):
        raise ValueError(f"{name} is on {value.device}; the {backend} backend takes tensors on {' or '.join(devices)}")
