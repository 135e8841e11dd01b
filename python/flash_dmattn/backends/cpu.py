"""The C++ engine on CPU tensors."""

from __future__ import annotations

from torch import Tensor

from .. import checks, operators
from ..problem import Problem

DEVICES = ("cpu",)
DTYPES = checks.FLOATING
MISSING: str | None = None


def attention_with_lse(problem: Problem) -> tuple[Tensor, Tensor]:
    return operators.forward(*problem)


def attention(problem: Problem) -> Tensor:
    return attention_with_lse(problem)[0]


def probabilities(problem: Problem, lse: Tensor) -> Tensor:
    query, key, _, *rest, _ = problem.detach()
    return operators.probabilities(query, key, lse.detach(), *rest)
