"""Attention where each query attends to the best-scored keys that it may see."""

from .api import (
    flash_dmattn_func,
    flash_dmattn_func_auto,
    flex_dmattn_func,
    get_available_backends,
    triton_dmattn_func,
)
from .backends import missing as _missing
from .dynamic_mask import DynamicMask

__all__ = [
    "CUDA_AVAILABLE",
    "FLEX_AVAILABLE",
    "TRITON_AVAILABLE",
    "DynamicMask",
    "flash_dmattn_func",
    "flash_dmattn_func_auto",
    "flex_dmattn_func",
    "get_available_backends",
    "triton_dmattn_func",
]

CUDA_AVAILABLE: bool
TRITON_AVAILABLE: bool
FLEX_AVAILABLE: bool


def __getattr__(name: str) -> str | bool:
    if name in ("CUDA_AVAILABLE", "TRITON_AVAILABLE", "FLEX_AVAILABLE"):  # found out when first asked for
        return _missing(name.removesuffix("_AVAILABLE").lower()) is None
    if name == "__version__":
        from importlib.metadata import version

        return version("flash_dmattn")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
