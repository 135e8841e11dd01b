"""Which block sizes, warps and stages a kernel takes: measured once, and kept in Triton's cache folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import triton

INTERPRETED: bool = triton.knobs.runtime.interpret


def tuned(
    configs: Sequence[tuple[dict[str, int], int, int]],
    *,
    key: Sequence[str],
    reset: Sequence[str] = (),
    prune: Callable[..., list[triton.Config]] | None = None,
) -> Callable[[Any], Any]:
    """triton.autotune over (blocks, warps, stages). reset: arguments that the kernel adds to, or counts in.

    The first is taken where nothing can be measured: in Triton's interpreter.
    """
    made = [triton.Config(blocks, num_warps=warps, num_stages=stages) for blocks, warps, stages in configs]
    return triton.autotune(
        made[:1] if INTERPRETED else made,
        key=list(key),
        reset_to_zero=list(reset) or None,
        prune_configs_by={"early_config_prune": prune} if prune and not INTERPRETED else None,
        cache_results=True,
    )


def length_bucket(*lengths: int) -> int:
    """A part of the tuning key: the same for lengths between the same powers of two."""
    bucket = 0
    for length in lengths:
        bucket = 64 * bucket + int(length).bit_length()
    return bucket
