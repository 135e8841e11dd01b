"""The C++ engine on CUDA tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks, operators
from ..problem import Problem
from . import cpu

DEVICES = ("cuda",)
DTYPES = (torch.float16, torch.bfloat16)


def __getattr__(name: str) -> str | None:
    # Found out when first asked for, as it takes the driver.
    if name != "MISSING":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    reason = operators.CUDA_MISSING
    missing = f"the cuda backend is missing: {reason}; use flex_dmattn_func for CUDA tensors" if reason else None
    return globals().setdefault(name, missing)


def attention_with_lse(problem: Problem) -> tuple[Tensor, Tensor]:
    checks.check_dtype("query", problem.query, DTYPES, " on CUDA; flex_dmattn_func also takes float32")
    return operators.forward(*problem)


def attention(problem: Problem) -> Tensor:
    return attention_with_lse(problem)[0]


probabilities = cpu.probabilities
