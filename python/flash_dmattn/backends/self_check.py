"""A try of a backend: attention so small that its answer is a few lines of float64.

Where it is tried for a call, it takes that call's dtype, head dim and kind of bias: what a backend compiles for these
serves the call, too. A kernel for few queries need not be that for many.
"""

from __future__ import annotations

import threading
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
    query = torch.linspace(-1, 1, 2 * 2 * head_dim).view(1, 2, 2, head_dim).to(dtype)
    key = torch.linspace(1, -0.5, 3 * head_dim).view(1, 3, 1, head_dim).to(dtype)
    value = torch.linspace(-1, 0.5, 3 * head_dim).view(1, 3, 1, head_dim).to(dtype)
    bias = torch.tensor([0.5, -0.25, 1.0]) if has_bias else torch.zeros(3)

    scores = query[0].double() @ key[0, :, 0].double().T / head_dim + bias.double()  # (queries, heads, keys)
    scores[0, :, 2] = -torch.inf  # causal: the first of two queries does not see the last of three keys
    expected = scores.softmax(-1) @ value[0, :, 0].double()

    try:
        problem = Problem(
            query.to(device), key.to(device), value.to(device), None,
            bias.view(1, 1, 1, 3).to(device) if has_bias else None, None, None,
            scale=1 / head_dim, softcap=0.0, is_causal=True, deterministic=False,
        )  # fmt: skip
        out = backend.attention(problem)[0].cpu().double()
    except Exception as error:
        first_line = str(error).strip().partition("\n")[0]
        return f"tried on {device}, it raised {type(error).__name__}: {first_line}"
    difference = float((out - expected).abs().max())
    # Values are at most 1: some roundings of theirs, and of the probabilities.
    if not difference <= 4 * torch.finfo(dtype).eps:
        return f"tried on {device}, its result differs from float64's by {difference:.2g}"
    return None
