"""The backends, best first. Each is a module with

    MISSING: str | None                         what keeps it from running here, and what to use instead
    DEVICES: tuple[str, ...]                    the types of devices whose tensors it takes
    DTYPES: tuple[torch.dtype, ...]             the dtypes that it takes
    attention(problem) -> out
    attention_with_lse(problem) -> (out, lse)
    probabilities(problem, lse) -> probs        without gradients

where `problem` is problem.Problem; one that is missing may have MISSING alone. A backend is imported when it is first
asked for, and tried once on each type of device before it is used there.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

BACKENDS = ("cuda", "triton", "flex", "cpu")

_loaded: dict[str, ModuleType] = {}
_tried: dict[tuple[str, str], str | None] = {}


def load(name: str) -> ModuleType:
    if name not in _loaded:
        _loaded[name] = _import(name)
    return _loaded[name]


def _import(name: str) -> ModuleType:
    # By statements, which torch.compile can trace.
    if name == "cuda":
        from . import cuda

        return cuda
    if name == "triton":
        from . import triton

        return triton
    if name == "flex":
        from . import flex

        return flex
    from . import cpu

    return cpu


def missing(name: str, device: str | None = None, query: Tensor | None = None, has_bias: bool = True) -> str | None:
    """What keeps the backend from running on this type of device, None: its usual one; None if nothing does.

    The first time that takes a try, which loads the backend's compiler and the driver of its device.
    query, has_bias: of the call that asks.
    """
    backend = load(name)
    reason: str | None = backend.MISSING
    if reason is not None or torch.compiler.is_compiling():  # a graph is no place for a try
        return reason
    if device is None or device not in backend.DEVICES:
        device = "cuda" if "cuda" in backend.DEVICES and torch.cuda.is_available() else "cpu"
    if (name, device) not in _tried:
        if device == "cuda" and torch.cuda.is_current_stream_capturing():  # nor is this one
            return None
        from .self_check import failure

        found = failure(backend, device, query, has_bias)
        _tried[name, device] = found and f"the {name} backend is missing: {found}"
    return _tried[name, device]


def describe() -> str:
    """A line for each backend: available, or why it is not. A backend that nobody has used yet is not tried for it."""
    reasons = {name: load(name).MISSING for name in BACKENDS}
    for (name, _), reason in _tried.items():
        reasons[name] = reasons[name] or reason
    return "\n".join(
        f"  {name:7} {reason.removeprefix(f'the {name} backend is ') if reason else 'available'}"
        for name, reason in reasons.items()
    )
