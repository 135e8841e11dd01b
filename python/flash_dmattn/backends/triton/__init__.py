"""Triton kernels, on every GPU that Triton compiles for; with TRITON_INTERPRET=1 interpreted, on CPU tensors."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from ... import checks
from ...problem import Problem

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def _find_missing() -> str | None:
    missing = None
    if importlib.util.find_spec("triton") is None:
        missing = f"torch {torch.__version__} comes without Triton"
    elif not _interpreted() and not torch.cuda.is_available():
        missing = "Triton's kernels need a GPU, or TRITON_INTERPRET=1, which interprets them, slowly"
    instead = "use flex_dmattn_func, or flash_dmattn_func for CPU tensors"
    return missing and f"the triton backend is missing: {missing}; {instead}"


def __getattr__(name: str) -> Any:
    # Found out when first asked for: it takes the driver.
    if name == "MISSING":
        return globals().setdefault(name, _find_missing())
    if name == "DEVICES":
        return globals().setdefault(name, ("cuda", "cpu") if _interpreted() else ("cuda",))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def attention_with_lse(problem: Problem) -> tuple[Tensor, Tensor]:
    from . import operators

    checks.check_dtype("query", problem.query, DTYPES)
    return operators.forward(*problem)


def attention(problem: Problem) -> Tensor:
    return attention_with_lse(problem)[0]


def probabilities(problem: Problem, lse: Tensor) -> Tensor:
    from . import operators

    query, key, _, *rest, _ = problem.detach()
    return operators.probabilities(query, key, lse.detach(), *rest)
