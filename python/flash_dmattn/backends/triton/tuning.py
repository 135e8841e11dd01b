"""Which block sizes, warps and stages a kernel takes: measured once, and kept in Triton's cache folder."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton

TUNED_BITS = 24  # of query_len and of the keys of a list, together: 2048 × 2048
TUNED_KEY_BITS = 17  # and one query, if it sees so many
INTERPRETED: bool = triton.knobs.runtime.interpret


def config(num_warps: int, num_stages: int, registers: int | None = None, **blocks: int) -> triton.Config:
    """A configuration. registers: of a thread, at most, so that several programs have room on a multiprocessor."""
    return triton.Config(blocks, num_warps=num_warps, num_stages=num_stages, maxnreg=registers)


def tuned(
    configs: Sequence[triton.Config],
    *,
    key: Sequence[str],
    reset: Sequence[str] = (),
    prune: Callable[[list[triton.Config], dict[str, Any]], list[triton.Config]],
) -> Callable[[Any], Any]:
    """triton.autotune over configurations, for problems that are large enough to be worth it.

    Others, and Triton's interpreter, take what needs the least room.

    Args:
        key: names of the arguments that make a choice of its own, "bucket" (`length_bucket`) among them.
        reset: those that the kernel adds to, or counts in.
        prune: leaves some configurations out, by the arguments.
    """

    def prune_all(made: list[triton.Config], arguments: dict[str, Any], **more: Any) -> list[triton.Config]:
        fitting = prune(made, {**arguments, **more})
        query_bits, key_bits = divmod({**arguments, **more}["bucket"], 64)
        if query_bits + key_bits >= TUNED_BITS or key_bits >= TUNED_KEY_BITS:
            return fitting
        return [min(fitting, key=lambda made: math.prod(made.kwargs.values()) * made.num_stages)]

    # AMD's compiler knows no number of registers.
    possible = [made for made in configs if made.maxnreg is None or not torch.version.hip]
    return triton.autotune(
        possible[:1] if INTERPRETED else possible,
        key=list(key),
        reset_to_zero=list(reset) or None,
        prune_configs_by=None if INTERPRETED else {"early_config_prune": prune_all},
        cache_results=True,
    )


def length_bucket(query_len: int, keys: int) -> int:
    """A part of the tuning key: the same for lengths between the same powers of two."""
    return 64 * int(query_len).bit_length() + int(keys).bit_length()
