"""The Triton backend beside the CUDA kernels, FlexAttention and torch's SDPA: same inputs, same run.

    python benchmarks/cuda_triton.py [--out benchmarks/results/cuda_triton.json] [--cases NAME ...]

As benchmarks/cuda_engine.py, whose inputs and way of timing these are. Outputs are compared with float64 in some rows,
gradients with the CUDA kernels'. Which configurations were chosen is printed; what tuning takes is a case of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable

import torch
import torch.nn.functional as F
from cuda_engine import (
    HEADS,
    KV_HEADS,
    SDPA,
    WINDOW,
    Rows,
    Sdpa,
    causal,
    error_of,
    in_graph,
    inputs,
    largest_error,
    main,
    median_ms,
    peers,
    quantity,
    result,
    scores,
    under,
    visible_pairs,
    without_gradients,
)
from torch import Tensor

from flash_dmattn import DynamicMask, flash_dmattn_func, flex_dmattn_func, selection, triton_dmattn_func


def chosen() -> Rows:
    """The configurations that tuning has chosen, on stdout."""
    from flash_dmattn.backends.triton import backward, forward

    for kernel in (forward._forward, backward._query_kernel, backward._key_kernel):
        print(f"  {kernel.base_fn.__name__}: {getattr(kernel, 'best_config', 'not run')}")
    yield from ()


def compare(name: str, pairs: int, leaves: list[Tensor], bias: Tensor | None, visible: Callable, options: dict) -> Rows:
    """Forward and backward of this backend and its peers, which get the same mask and bias."""
    query, key, value = leaves
    wanted = [*leaves, bias] if bias is not None else leaves
    grad_out = torch.randn_like(query)
    dense = {name: Sdpa(backend, query, key, value) for name, backend in SDPA.items()}
    functions = {"CUDA kernels": flash_dmattn_func, "FlexAttention": flex_dmattn_func}

    def attend(function: Callable, **more: object) -> Callable[[], Tensor]:
        return lambda: function(*leaves, attn_bias=bias, is_causal=True, **options, **more)

    def backward_of(function: Callable, **more: object) -> Callable[[], tuple[Tensor, ...]]:
        out: list[Tensor] = []

        def run() -> tuple[Tensor, ...]:
            if not out:
                out.append(attend(function, **more)())
            return torch.autograd.grad(out[0], wanted, grad_out, retain_graph=True)

        return run

    forward = without_gradients(attend(triton_dmattn_func))
    error = error_of(forward(), query, key, value, bias, visible)
    yield result(
        f"{name}, forward", median_ms(forward), pairs=pairs, error=error,
        peers=peers({
            **{name: without_gradients(attend(function)) for name, function in functions.items()},
            **{name: without_gradients(peer.forward) for name, peer in dense.items()},
        }),
    )  # fmt: skip
    expected = backward_of(flash_dmattn_func)()
    for deterministic in (False, True):
        backward = backward_of(triton_dmattn_func, deterministic=deterministic)
        yield result(
            f"{name}, backward{', deterministic' * deterministic}", median_ms(backward), pairs=pairs, products=5,
            error=largest_error(backward(), expected),
            peers=peers({
                **{name: backward_of(function) for name, function in functions.items()},
                **{name: peer.backward for name, peer in dense.items()},
            } if not deterministic else {}),
        )  # fmt: skip
    yield from chosen()


def dynamic(length: int = 32768) -> Rows:
    leaves, bias = inputs(length), scores(length)
    made = DynamicMask.from_score(bias.detach()[:, :, 0], WINDOW)
    yield from compare(
        f"dynamic mask w {WINDOW}, N {length}, per-key bias, mask given",
        visible_pairs(made), leaves, bias, under(made), {"attn_mask": made},
    )  # fmt: skip


def dynamic_8192() -> Rows:
    yield from dynamic(8192)


def dynamic_131072() -> Rows:
    yield from dynamic(131072)


def dense(length: int = 8192) -> Rows:
    pairs = HEADS * length * (length + 1) // 2
    for name, bias in (("per-key bias", scores(length)), ("no bias", None)):
        yield from compare(f"dense causal, {name}, N {length}", pairs, inputs(length), bias, causal(length, length), {})


def bool_mask(length: int = 8192) -> Rows:
    query, key, value = (x.detach() for x in inputs(length))
    made = DynamicMask.from_score(scores(length).detach()[:, :, 0], WINDOW)
    mask = made.to_dense()
    out = triton_dmattn_func(query, key, value, mask)
    yield result(
        f"bool mask (1, {KV_HEADS}, N, N), the {WINDOW} best of each row, N {length}, forward",
        median_ms(lambda: triton_dmattn_func(query, key, value, mask)),
        error=error_of(out, query, key, value, None, under(made)),
        peers=peers({"CUDA kernels": lambda: flash_dmattn_func(query, key, value, mask)}),
    )


def decode(length: int = 524288) -> Rows:
    query, key, value = (x.detach() for x in inputs(length, query_len=1))
    bias = scores(length).detach()
    made = DynamicMask.from_score(bias[:, :, 0], WINDOW, query_len=1)
    heads_first = [x.transpose(1, 2).contiguous() for x in (query, key, value)]

    for name, mask in ((f"dynamic mask w {WINDOW} given", made), ("dense", None)):

        def attend(function: Callable = triton_dmattn_func, mask: DynamicMask | None = mask) -> Tensor:
            return function(query, key, value, attn_bias=bias, is_causal=True, attn_mask=mask)

        visible = causal(1, length) if mask is None else under(mask)
        sdpa = {"SDPA FlashAttention": lambda: F.scaled_dot_product_attention(*heads_first, enable_gqa=True)}
        yield result(
            f"decode, Q 1, K {length}, {name}, in a graph", median_ms(in_graph(attend)),
            error=error_of(attend(), query, key, value, bias, visible),
            peers=peers({"CUDA kernels": in_graph(lambda attend=attend: attend(flash_dmattn_func))} | {
                name: in_graph(function) for name, function in sdpa.items()
            }),
        )  # fmt: skip


def mask() -> Rows:
    """By torch operations, where the engine has no kernels."""
    for length in (32768, 1048576):
        score = scores(length).detach()[:, :, 0]
        ms = median_ms(lambda score=score: selection.dynamic_mask(score, None, WINDOW, score.size(2), True), repeats=5)
        engine = {"CUDA kernels": lambda score=score: DynamicMask.from_score(score, WINDOW)}
        yield result(f"dynamic mask from scores, N {length}, 8 heads, w {WINDOW}", ms, peers=peers(engine))


FIRST_CALL = """
import time, torch
from flash_dmattn import triton_dmattn_func
def attend(length):
    query, key, value = (torch.randn(1, length, h, 128, device="cuda").bfloat16().requires_grad_() for h in (2, 1, 1))
    torch.cuda.synchronize()
    start = time.perf_counter()
    out = triton_dmattn_func(query, key, value, is_causal=True)
    torch.autograd.grad(out, (query, key, value), out)
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)
print(attend(4200), attend(4200), attend(7000), attend(9000))
"""


def first_call() -> Rows:
    """Wall clock of a process's first step, with nothing compiled and tuned, and in a second process."""
    with tempfile.TemporaryDirectory() as folder:
        for cache in ("empty", "filled"):
            ran = subprocess.run(
                [sys.executable, "-c", FIRST_CALL],
                env={**os.environ, "TRITON_CACHE_DIR": folder},
                capture_output=True,
                text=True,
            )
            if ran.returncode:
                raise RuntimeError(ran.stderr)
            times = [float(ms) for ms in ran.stdout.split()]
            names = ("first", "second", "length below the next power of two", "length beyond it")
            for name, ms in zip(names, times, strict=True):
                yield quantity(f"forward and backward, cache {cache}, {name}", ms, "ms")


CASES = {
    "dynamic": dynamic,
    "dynamic-8192": dynamic_8192,
    "dynamic-131072": dynamic_131072,
    "dense": dense,
    "bool-mask": bool_mask,
    "decode": decode,
    "mask": mask,
    "first-call": first_call,
}

if __name__ == "__main__":
    sys.exit(main(CASES, __doc__))
