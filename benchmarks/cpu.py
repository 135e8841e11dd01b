"""The CPU engine against torch's scaled_dot_product_attention (SDPA): the same inputs, the same run, outputs compared.

    python benchmarks/cpu.py [--output benchmarks/results/cpu.json] [--only TEXT] [--repeats 5]

Prints a line for each case and writes all of them, with the machine and the commit, as JSON. Peers take turns within a
case, so that a busy moment of the machine falls on all of them; times are medians. Exits with 1 if an output is wrong.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_dmattn import DynamicMask, flash_dmattn_func

BATCH, HEADS, HEAD_DIM = 1, 8, 64
WINDOW = 1024


def median_seconds(functions: list[Callable[[], object]], repeats: int) -> list[float]:
    """The median time of each, after one call to warm up; they take turns."""
    times: list[list[float]] = [[] for _ in functions]
    for repeat in range(repeats + 1):
        for function, sample in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            if repeat > 0:
                sample.append(time.perf_counter() - start)
    return [statistics.median(sample) for sample in times]


def inputs(length: int, kv_heads: int = HEADS, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """query, key, value and a gradient of the output, in this library's layout."""
    generator = torch.Generator().manual_seed(length)

    def normal(heads: int) -> Tensor:
        return torch.randn(BATCH, length, heads, HEAD_DIM, generator=generator).to(dtype)

    return normal(HEADS), normal(kv_heads), normal(kv_heads), normal(HEADS)


def heads_first(*tensors: Tensor) -> list[Tensor]:
    """SDPA's layout, contiguous: what it is fastest with."""
    return [tensor.transpose(1, 2).contiguous().requires_grad_(tensor.requires_grad) for tensor in tensors]


def relative_error(got: Tensor, expected: Tensor) -> float:
    got, expected = got.detach().double(), expected.detach().double()
    return float((got - expected).norm() / expected.norm())


def with_gradient(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def dense_causal(length: int, dtype: torch.dtype, repeats: int) -> list[dict]:
    """Dense causal attention: forward alone, then backward alone."""
    query, key, value, grad = inputs(length, dtype=dtype)
    peer = [tensor.detach().requires_grad_() for tensor in heads_first(query, key, value)]
    ours = with_gradient(query, key, value)
    with torch.no_grad():
        peer_forward, our_forward = median_seconds(
            [
                lambda: F.scaled_dot_product_attention(*peer, is_causal=True),
                lambda: flash_dmattn_func(*ours, is_causal=True),
            ],
            repeats,
        )
    peer_out = F.scaled_dot_product_attention(*peer, is_causal=True)
    our_out = flash_dmattn_func(*ours, is_causal=True)
    peer_grad = heads_first(grad)[0]
    error = relative_error(our_out.transpose(1, 2), peer_out)
    name = f"dense causal, {str(dtype).removeprefix('torch.')}, N {length}"
    rows = [result(f"{name}, forward", our_forward, peer_forward, error, 1e-5 if dtype == torch.float32 else 1e-2)]
    peer_grads = torch.autograd.grad(peer_out, peer, peer_grad, retain_graph=True)
    our_grads = torch.autograd.grad(our_out, ours, grad, retain_graph=True)
    error = max(relative_error(o.transpose(1, 2), p) for o, p in zip(our_grads, peer_grads, strict=True))
    peer_backward, our_backward = median_seconds(
        [
            lambda: torch.autograd.grad(peer_out, peer, peer_grad, retain_graph=True),
            lambda: torch.autograd.grad(our_out, ours, grad, retain_graph=True),
        ],
        repeats,
    )
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    return [*rows, result(f"{name}, backward", our_backward, peer_backward, error, tolerance)]


def reference_rows(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, mask: DynamicMask, rows: Tensor) -> Tensor:
    """The output at some query positions, in float64, from the definition."""
    group = query.size(2) // key.size(2)
    key, value = (x.detach().double().repeat_interleave(group, 2) for x in (key, value))
    score = torch.einsum("bqhd,bkhd->bhqk", query.detach()[:, rows].double(), key) * HEAD_DIM**-0.5
    score = score + bias.detach().double().repeat_interleave(group, 1)
    position = torch.arange(key.size(1))
    visible = (position <= rows[:, None]) & (rows[:, None] < mask.end.repeat_interleave(group, 1)[:, :, None])
    return torch.einsum("bhqk,bkhd->bqhd", score.masked_fill(~visible, -torch.inf).softmax(-1), value)


def dynamic_mask(length: int, repeats: int, with_peer: bool) -> list[dict]:
    """Scores in, gradients out: the mask from the bias, forward and backward with the bias's gradient."""
    query, key, value, grad = inputs(length, kv_heads=4)
    ours = with_gradient(query, key, value)
    bias = torch.randn(BATCH, 4, 1, length, generator=torch.Generator().manual_seed(1)).requires_grad_()

    def step() -> None:
        out = flash_dmattn_func(*ours, attn_bias=bias, is_causal=True, keep_window_size=WINDOW)
        torch.autograd.grad(out, (*ours, bias), grad)

    peer = [
        x.detach().requires_grad_()
        for x in heads_first(query, key.repeat_interleave(2, 2), value.repeat_interleave(2, 2))
    ]
    peer_grad = heads_first(grad)[0]

    def peer_step() -> None:
        torch.autograd.grad(F.scaled_dot_product_attention(*peer, is_causal=True), peer, peer_grad)

    mask = DynamicMask.from_score(bias.detach()[:, :, 0], WINDOW)
    with torch.no_grad():
        out = flash_dmattn_func(*ours, attn_mask=mask, attn_bias=bias)
        our_forward, our_mask = median_seconds(
            [
                lambda: flash_dmattn_func(*ours, attn_mask=mask, attn_bias=bias),
                lambda: DynamicMask.from_score(bias.detach()[:, :, 0], WINDOW),
            ],
            repeats,
        )
    rows = torch.linspace(0, length - 1, 64).long()
    error = relative_error(out[:, rows], reference_rows(query, key, value, bias, mask, rows))
    name = f"dynamic mask w {WINDOW}, N {length}"
    if with_peer:
        peer_seconds, our_seconds = median_seconds([peer_step, step], repeats)
    else:
        peer_seconds, our_seconds = None, median_seconds([step], repeats)[0]
    return [
        result(f"{name}, forward + backward with bias gradient", our_seconds, peer_seconds, error, 1e-5),
        quantity(f"{name}, making the mask, share of the forward", 100 * our_mask / our_forward, "%"),
    ]


def tile_mask(length: int, tile: int, repeats: int) -> list[dict]:
    """A dense bool mask that hides three quarters of its tiles."""
    query, key, value, _ = inputs(length)
    tiles = torch.rand(length // tile, length // tile, generator=torch.Generator().manual_seed(2)) < 0.25
    tiles[:, 0] |= ~tiles.any(1)  # no query without keys
    mask = tiles.repeat_interleave(tile, 0).repeat_interleave(tile, 1)[None, None]
    peer = heads_first(query, key, value)
    with torch.no_grad():
        error = relative_error(
            flash_dmattn_func(query, key, value, attn_mask=mask).transpose(1, 2),
            F.scaled_dot_product_attention(*peer, attn_mask=mask),
        )
        peer_seconds, our_seconds = median_seconds(
            [
                lambda: F.scaled_dot_product_attention(*peer, attn_mask=mask),
                lambda: flash_dmattn_func(query, key, value, attn_mask=mask),
            ],
            repeats,
        )
    name = f"dense bool mask, three quarters of its {tile} x {tile} tiles hidden, N {length}, forward"
    return [result(name, our_seconds, peer_seconds, error, 1e-5)]


def peak_memory(length: int) -> float:
    """MiB that one training step takes over inputs, outputs and gradients, in a process of its own."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import cpu; print(cpu.step_memory({length}))"
    )
    return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def step_memory(length: int) -> float:
    def resident(field: str) -> float:
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(field)) / 1024

    warm = [torch.randn(1, 64, 1, 64, requires_grad=True) for _ in range(3)]
    flash_dmattn_func(*warm, is_causal=True).sum().backward()
    query, key, value, grad = inputs(length, kv_heads=4)
    leaves = [x.requires_grad_() for x in (query, key, value, torch.randn(BATCH, 4, 1, length))]
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmRSS")
    out = flash_dmattn_func(*leaves[:3], attn_bias=leaves[3], is_causal=True, keep_window_size=WINDOW)
    grads = torch.autograd.grad(out, leaves, grad)
    results = sum(x.nbytes for x in (out, *grads)) / 2**20
    return resident("VmHWM") - before - results


def result(name: str, ours: float, peer: float | None, error: float, tolerance: float) -> dict:
    row = {"case": name, "ms": 1e3 * ours, "error": error, "right": error <= tolerance}
    if peer is not None:
        row |= {"peer_ms": 1e3 * peer, "times_as_fast": peer / ours}
    report(row)
    return row


def report(row: dict) -> None:
    line = f"{row['case']:<92}"
    if "ms" in row:
        line += f" {row['ms']:9.1f} ms"
    if "peer_ms" in row:
        line += f"   peer {row['peer_ms']:9.1f} ms   {row['times_as_fast']:6.2f} x"
    if "value" in row:
        line += f" {row['value']:9.2f} {row['unit']}"
    if not row.get("right", True):
        line += f"   WRONG: relative error {row['error']:.1e}"
    print(line, flush=True)


def quantity(name: str, value: float, unit: str) -> dict:
    row = {"case": name, "value": value, "unit": unit}
    report(row)
    return row


def growth(repeats: int) -> list[dict]:
    """The dynamic mask from 8192 to 65536: eight times the queries, each with its full window at the end of both."""
    short = dynamic_mask(8192, repeats, with_peer=True)
    long = dynamic_mask(65536, max(1, repeats // 2), with_peer=False)

    def pairs(length: int) -> int:
        return sum(min(position + 1, WINDOW) for position in range(length))

    per_pair = (long[0]["ms"] / pairs(65536)) / (short[0]["ms"] / pairs(8192))
    per_token = (long[0]["ms"] / 65536) / (short[0]["ms"] / 8192)
    memory = [peak_memory(length) for length in (8192, 65536)]
    return [
        *short,
        *long,
        quantity("dynamic mask, time per visible pair at N 65536 over that at 8192", per_pair, "x"),
        quantity("dynamic mask, time per token at N 65536 over that at 8192", per_token, "x"),
        quantity("dynamic mask, training step, extra memory, N 8192", memory[0], "MiB"),
        quantity("dynamic mask, training step, extra memory, N 65536", memory[1], "MiB"),
    ]


CASES: dict[str, Callable[[int], list[dict]]] = {
    "dense float32 2048": lambda repeats: dense_causal(2048, torch.float32, 4 * repeats),
    "dense float32 8192": lambda repeats: dense_causal(8192, torch.float32, repeats),
    "dense bfloat16 2048": lambda repeats: dense_causal(2048, torch.bfloat16, 4 * repeats),
    "dense bfloat16 8192": lambda repeats: dense_causal(8192, torch.bfloat16, repeats),
    "mask of tiles 64": lambda repeats: tile_mask(8192, 64, repeats),
    "mask of tiles 128": lambda repeats: tile_mask(8192, 128, repeats),
    "dynamic": growth,
}


def machine() -> dict:
    def output_of(*command: str) -> str:
        return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()

    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        "",
    )
    return {
        "date": datetime.date.today().isoformat(),
        "commit": output_of("git", "rev-parse", "HEAD"),
        "changed": bool(output_of("git", "status", "--porcelain", "--", "../src", "../include", "../python")),
        "cpu": cpu or platform.processor(),
        "instruction_set": torch.ops.flash_dmattn.cpu_instruction_set(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "shape": f"B {BATCH}, H {HEADS}, D {HEAD_DIM}",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="where to write the results as JSON")
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of the long cases (default 5)")
    options = parser.parse_args()
    described = machine()
    print(", ".join(f"{name} {value}" for name, value in described.items()))
    rows = [row for name, case in CASES.items() if options.only in name for row in case(options.repeats)]
    if options.output:
        options.output.write_text(json.dumps({"machine": described, "results": rows}, indent=1) + "\n")
    return 0 if all(row.get("right", True) for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
