"""A try of a backend: attention so small that its answer is a few lines of float64.

Where it is tried for a call, it takes that call's dtype, head dim and kind of bias, and on a GPU the kernels for long
inputs: what a backend compiles for the try serves most calls, too.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from ..problem import Problem


def failure(backend: ModuleType, device: str, query: Tensor | None = None, has_bias: bool = True) -> str | None:
    """What went wrong, or None. query, has_bias: of the call that it is tried for."""
    dtype = query.dtype if query is not None and query.dtype in backend.DTYPES else backend.DTYPES[0]
    head_dim = min(max(1, query.size(3)), 256) if query is not None else 16
    # One GPU that works is enough.
    devices = [f"cuda:{index}" for index in range(torch.cuda.device_count())] if device == "cuda" else [device]
    failures: list[str | None] = []

    def try_until_one_works() -> None:
        for each in devices:
            failures.append(_failure(backend, each, dtype, head_dim, has_bias))
            if failures[-1] is None:
                return

    # What stands in for a GPU that is not there is set up by the first thread that traces, and torch 2.10 crashes when
    # that thread has ended.
    if hasattr(torch._C, "_ensureCUDADeviceGuardSet"):
        torch._C._ensureCUDADeviceGuardSet()
    # In a thread of its own: no mode in which the caller may be reaches it.
    thread = threading.Thread(target=try_until_one_works)
    thread.start()
    thread.join()
    return None if None in failures else failures[0]


def _failure(backend: ModuleType, device: str, dtype: torch.dtype, head_dim: int, has_bias: bool) -> str | None:
    # On a GPU as long, and as often, as takes kernels for long inputs. There are two queries in turn; all KV heads have
    # the same numbers.
    query_len, key_len, kv_heads = 2, 3, 1
    if device != "cpu":
        query_len, key_len, kv_heads = 128, 129, torch.cuda.get_device_properties(device).multi_processor_count
    query = torch.linspace(-1, 1, 2 * 2 * head_dim).view(1, 2, 2, head_dim).to(dtype)
    key = torch.linspace(1, -0.5, key_len * head_dim).view(1, key_len, 1, head_dim).to(dtype)
    value = torch.linspace(-1, 0.5, key_len * head_dim).view(1, key_len, 1, head_dim).to(dtype)
    bias = torch.linspace(1, -1, key_len) if has_bias else torch.zeros(key_len)

    # Some rows, and two KV heads; a vector at a time, so few numbers that no threads start, and no matrix products, for
    # which a library is loaded: both take longer than the attention.
    rows = [0, query_len // 2, query_len - 1]
    keys, values = (x[0, :, 0].double() for x in (key, value))
    scores = _each(query[0, [row % 2 for row in rows]].double(), lambda one: (keys * one).sum(-1))
    scores = scores / head_dim + bias.double()  # (rows, heads, keys)
    # Causal: of a key more than queries the first query does not see the last but one, …
    hidden = torch.arange(key_len) > torch.tensor(rows)[:, None, None] + 1
    probabilities = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    expected = _each(probabilities, lambda one: (values * one[:, None]).sum(0))

    try:
        query = query.to(device).repeat(1, query_len // 2, kv_heads, 1)
        key, value = (x.to(device).repeat(1, 1, kv_heads, 1) for x in (key, value))
        problem = Problem(
            query, key, value, None, bias.view(1, 1, 1, -1).to(device) if has_bias else None, None, None,
            scale=1 / head_dim, softcap=0.0, is_causal=True, deterministic=False,
        )  # fmt: skip
        out = backend.attention(problem)[0]
        out = torch.stack([out[row].cpu() for row in rows]).unflatten(1, (kv_heads, 2))[:, [0, -1]].double()
        difference = float((out - expected[:, None]).abs().max())
    except Exception as error:
        first_line = str(error).strip().partition("\n")[0]
        return f"tried on {device}, it raised {type(error).__name__}: {first_line}"
    # Values are at most 1: some roundings of theirs, and of the probabilities; more of these where there are many keys.
    if not difference <= max(4 * torch.finfo(dtype).eps, 0 if device == "cpu" else 1e-5):
        return f"tried on {device}, its result differs from float64's by {difference:.2g}"
    return None


def _each(vectors: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Of each of (rows, heads, …)."""
    return torch.stack([torch.stack([function(one) for one in row]) for row in vectors])
