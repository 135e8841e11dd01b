"""Triton kernels."""

from __future__ import annotations

MISSING: str | None = (
    "the triton backend is missing: this flash_dmattn has no Triton kernels; use flex_dmattn_func, or "
    "flash_dmattn_func for CPU tensors"
)
