"""The C++ engine on CUDA tensors."""

from __future__ import annotations

MISSING: str | None = (
    "the cuda backend is missing: this flash_dmattn has no CUDA kernels; use flex_dmattn_func for CUDA tensors"
)
