"""The flex backend: making its lists, attention with and without gathered keys; beside the CUDA kernels and torch's.

    python benchmarks/flex.py [--out benchmarks/results/flex.json] [--cases NAME ...]

As benchmarks/cuda_engine.py, whose peers, inputs and way of timing these are. Under a dynamic mask, forward and
backward, with a per-key bias and its gradient; outputs are compared with float64 in some rows, gradients with the CUDA
kernels'.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from cuda_engine import (
    HEADS,
    KV_HEADS,
    SDPA,
    WINDOW,
    Rows,
    Sdpa,
    error_of,
    host_us,
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
    without_default_device,
    without_gradients,
)
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import create_block_mask

from flash_dmattn import DynamicMask, flash_dmattn_func, flex_dmattn_func
from flash_dmattn.backends import flex
from flash_dmattn.backends.tiles import Blocks, Cut, Tiles, make_blocks, make_tiles
from flash_dmattn.problem import make_problem


def without_survivors(mask: DynamicMask) -> DynamicMask:
    """The same mask, for which keys are not gathered."""
    return DynamicMask(mask.end, mask.keep_window_size, is_causal=True, query_len=mask.query_len)


WAYS: dict[str, Callable[[DynamicMask], DynamicMask]] = {
    "keys gathered": lambda mask: mask,
    "blocks of all keys": without_survivors,
}


def dynamic(length: int = 32768) -> Rows:
    query, key, value = leaves = inputs(length)
    bias = scores(length)
    score = bias.detach()[:, :, 0]
    made = DynamicMask.from_score(score, WINDOW)
    grad_out = torch.randn_like(query)
    wanted = (*leaves, bias)
    pairs = visible_pairs(made)
    name = f"dynamic mask w {WINDOW}, N {length}"

    end = made.end

    def is_visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (q < end[b, h // (HEADS // KV_HEADS), k])

    for way, prepare in WAYS.items():
        problem = make_problem(*leaves, prepare(made), bias, None, None, None, None, None).detach()

        def lists(problem: object = problem) -> object:
            return make_blocks(*make_tiles(problem), backward=False)

        def lists_for_training(problem: object = problem) -> object:
            return make_blocks(*make_tiles(problem), backward=True)

        tiles, cut = make_tiles(problem)

        def lists_of_tiles(backward: bool = False, tiles: Tiles = tiles, cut: Cut = cut) -> Blocks:
            return make_blocks(tiles, cut, backward=backward)

        yield result(
            f"{name}, lists of blocks (BlockMask) of tiles, {way}",
            median_ms(lists_of_tiles),
            peers=peers({"create_block_mask": lambda: create_block_mask(is_visible, 1, HEADS, length, length)}),
        )  # fmt: skip
        with without_default_device():
            (us,) = host_us({"": lists_of_tiles}).values()
        yield quantity(f"{name}, lists of blocks (BlockMask) of tiles, {way}, host time per call", us, "µs")
        ms = median_ms(lambda lists_of_tiles=lists_of_tiles: lists_of_tiles(backward=True))
        yield result(f"{name}, lists of blocks (BlockMask) of tiles, those of the backward pass, too, {way}", ms)
        yield result(f"{name}, tiles and lists of blocks, {way}", median_ms(lists))
        yield result(
            f"{name}, tiles and lists of blocks, those of the backward pass, too, {way}", median_ms(lists_for_training)
        )
        blocks = lists_of_tiles()
        run = without_gradients(lambda t=tiles, b=blocks, p=problem: flex._run(t, b, p.scale, p.softcap))
        yield result(f"{name}, FlexAttention's kernel, {way}", median_ms(run), pairs=pairs)

    dense = {name: Sdpa(backend, query, key, value) for name, backend in SDPA.items()}

    def engine(deterministic: bool = False) -> Tensor:
        return flash_dmattn_func(
            *leaves, attn_bias=bias, is_causal=True, keep_window_size=WINDOW, deterministic=deterministic
        )

    engine_out = engine()
    expected = torch.autograd.grad(engine_out, wanted, grad_out, retain_graph=True)

    def engine_backward() -> object:
        return torch.autograd.grad(engine_out, wanted, grad_out, retain_graph=True)

    for way, prepare in WAYS.items():

        def forward(deterministic: bool = False, prepare: Callable = prepare) -> Tensor:
            return flex_dmattn_func(
                *leaves, attn_mask=prepare(DynamicMask.from_score(score, WINDOW)), attn_bias=bias,
                deterministic=deterministic,
            )  # fmt: skip

        with torch.no_grad():
            error = error_of(forward(), query, key, value, bias, under(made))
        yield result(
            f"{name}, per-key bias, mask and forward, {way}", median_ms(without_gradients(forward)), pairs=pairs,
            error=error,
            peers=peers({
                "CUDA kernels": without_gradients(engine),
                **{name: without_gradients(peer.forward) for name, peer in dense.items()},
            }),
        )  # fmt: skip
        for deterministic in (False, True):
            out = forward(deterministic)
            grads = torch.autograd.grad(out, wanted, grad_out, retain_graph=True)

            def backward(out: Tensor = out) -> object:
                return torch.autograd.grad(out, wanted, grad_out, retain_graph=True)

            yield result(
                f"{name}, backward with bias gradient{', deterministic' * deterministic}, {way}",
                median_ms(backward, repeats=5), pairs=pairs, products=5, error=largest_error(grads, expected),
                peers=peers({
                    "CUDA kernels": engine_backward, **{name: peer.backward for name, peer in dense.items()}
                }),
            )  # fmt: skip
        out = flex_dmattn_func(*leaves, attn_mask=prepare(made), attn_bias=bias.detach())

        def backward_without_bias(out: Tensor = out) -> object:
            return torch.autograd.grad(out, leaves, grad_out, retain_graph=True)

        yield result(
            f"{name}, backward without bias gradient, {way}", median_ms(backward_without_bias, repeats=5), pairs=pairs,
            products=5,
        )  # fmt: skip


def dynamic_8192() -> Rows:
    yield from dynamic(8192)


def long(length: int = 131072) -> Rows:
    """Gathered keys only: the other way is quadratic."""
    leaves, bias = inputs(length), scores(length)
    grad_out = torch.randn_like(leaves[0])

    def forward() -> Tensor:
        return flex_dmattn_func(*leaves, attn_bias=bias, is_causal=True, keep_window_size=WINDOW)

    yield result(f"dynamic mask w {WINDOW}, N {length}, mask and forward", median_ms(without_gradients(forward)))
    out = forward()
    ms = median_ms(lambda: torch.autograd.grad(out, (*leaves, bias), grad_out, retain_graph=True), repeats=5)
    yield result(f"dynamic mask w {WINDOW}, N {length}, backward with bias gradient", ms)


def compilations() -> Rows:
    """Of attention with gradients at many lengths."""

    def step(length: int) -> None:
        leaves, bias = inputs(length), scores(length)
        out = flex_dmattn_func(*leaves, attn_bias=bias, is_causal=True, keep_window_size=64)
        torch.autograd.grad(out, (*leaves, bias), out)

    before = counters["stats"]["unique_graphs"]
    lengths = range(1030, 2048, 37)
    for length in lengths:
        step(length)
    yield quantity(
        f"compilations for {len(lengths)} lengths from 1030 to 2047", counters["stats"]["unique_graphs"] - before, ""
    )


CASES = {"dynamic": dynamic, "dynamic-8192": dynamic_8192, "long": long, "compilations": compilations}

if __name__ == "__main__":
    sys.exit(main(CASES, __doc__))
