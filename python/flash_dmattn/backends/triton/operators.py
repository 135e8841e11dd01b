"""The passes as operators `torch.ops.flash_dmattn_triton.*`, so that a compiler need not look into them.

Arguments and results are those of the engine's operators of the same name.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from ... import operators
from ...problem import Problem
from . import backward as backward_pass
from . import forward as forward_pass
from . import pairs

PROBLEM = "Tensor? mask, Tensor? bias, Tensor? end, Tensor? survivors, float scale, float softcap, bool is_causal"
LIBRARY = torch.library.Library("flash_dmattn_triton", "DEF")
LIBRARY.define(
    f"forward(Tensor query, Tensor key, Tensor value, {PROBLEM}, bool deterministic) -> (Tensor out, Tensor lse)"
)
LIBRARY.define(
    "backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, "
    f"Tensor? mask_bits, {PROBLEM}, bool deterministic, bool needs_bias_grad) -> "
    "(Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_bias)"
)
LIBRARY.define(f"probabilities(Tensor query, Tensor key, Tensor lse, {PROBLEM}) -> Tensor")


def _on(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Where Triton launches: on the current device, not on that of its arguments."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _forward(query: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    with _on(query):
        return forward_pass.forward(Problem(query, *rest))


def _backward(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    mask_bits: Tensor | None, *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    problem, needs_bias_grad = Problem(query, key, value, *rest[:-1]), rest[-1]
    with _on(query):
        grad_query, grad_key, grad_value, grad_bias = backward_pass.backward(
            problem, out, lse, grad_out, grad_lse, needs_bias_grad
        )
    return grad_query, grad_key, grad_value, query.new_empty((0,)) if grad_bias is None else grad_bias


def _probabilities(query: Tensor, key: Tensor, lse: Tensor, *rest: Any) -> Tensor:
    with _on(query):
        return pairs.probabilities(Problem(*(query, key, key, *rest, True)), lse)


for name, implementation, fake in (
    ("forward", _forward, operators.fake_forward),
    ("backward", _backward, operators.fake_backward),
    ("probabilities", _probabilities, operators.fake_probabilities),
):
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"flash_dmattn_triton::{name}", fake, lib=LIBRARY)

forward = operators.with_gradients(
    torch.ops.flash_dmattn_triton.forward.default, torch.ops.flash_dmattn_triton.backward.default
)
probabilities = torch.ops.flash_dmattn_triton.probabilities.default
