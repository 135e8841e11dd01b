"""The families of CUDA kernels against each other and torch's cuDNN attention: same inputs, same run.

    python benchmarks/cuda_families.py [--out FILE] [--cases TEXT] [--families hopper generic]

Prints a line of JSON for each case and family: milliseconds and useful TFLOP/s (of visible pairs: 4 D each forward,
10 D backward) of the passes by CUDA events, of their longest kernel by the profiler, and the errors against float64 of
some rows and keys. A family is chosen once per process, so that each has its own; one that hangs is ended. Exits with 1
if something is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from cuda_engine import machine, median_ms
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flash_dmattn import operators

LARGEST_ERROR = 2e-2  # of 16-bit numbers, relative to the largest value
PATIENCE = 300  # seconds that a family may take
LONGEST_PEER = 200_000  # dense attention takes seconds beyond
SHORTEST_SUSTAINED = 100_000  # of which a sample of a few calls runs at another clock than one of many


@dataclass(frozen=True)
class Case:
    length: int
    window: int  # 0: dense
    head_dim: int = 128
    heads: int = 16
    kv_heads: int = 8
    batch: int = 1
    is_bool: bool = False  # the dynamic mask as a bool mask (1, Hk, N, N)

    def __str__(self) -> str:
        what = f"w {self.window}{' bool' * self.is_bool}" if self.window else "dense"
        sizes = f"D {self.head_dim} H {self.heads} Hk {self.kv_heads}"
        return f"N {self.length} {what} {sizes}" + (f" B {self.batch}" if self.batch > 1 else "")

    @property
    def pairs(self) -> int:
        """Visible, of one head."""
        window = min(self.window or self.length, self.length)
        return window * self.length - window * (window - 1) // 2


CASES = (
    Case(700, 0, kv_heads=2, heads=4),
    Case(700, 0, head_dim=64, kv_heads=2, heads=4),
    Case(1500, 300, head_dim=96, kv_heads=1, heads=3),
    *(Case(length, window) for length, window in ((8192, 1024), (32768, 1024), (32768, 2048), (131072, 2048))),
    Case(1048576, 2048),
    *(Case(32768, 1024, kv_heads=kv_heads) for kv_heads in (16, 4, 2)),
    Case(16384, 1024),
    Case(16384, 1024, is_bool=True),
    *(Case(4096, 0, kv_heads=kv_heads, batch=4) for kv_heads in (16, 8)),
    *(Case(16384, 0, kv_heads=kv_heads) for kv_heads in (16, 8)),
    Case(4096, 0, head_dim=64, heads=32, kv_heads=32, batch=4),
    Case(16384, 0, head_dim=64, heads=32, kv_heads=32),
)


class Problem:
    """A case's tensors, its passes and their errors."""

    def __init__(self, case: Case) -> None:
        self.case = case
        length, head_dim = case.length, case.head_dim
        batch = case.batch
        self.query, self.grad_out = (torch.randn(batch, length, case.heads, head_dim).bfloat16() for _ in range(2))
        self.key, self.value = (torch.randn(batch, length, case.kv_heads, head_dim).bfloat16() for _ in range(2))
        self.score = torch.randn(batch, case.kv_heads, length).bfloat16()
        self.mask: tuple[Tensor | None, Tensor | None] = self.make_mask() if case.window else (None, None)
        self.bool_mask = self.as_bool() if case.is_bool else None
        self.out, self.lse, self.mask_bits = self.saving_forward()

    def make_mask(self) -> tuple[Tensor, Tensor]:
        return operators.dynamic_mask(self.score, None, self.case.window, self.case.length, True)

    def as_bool(self) -> Tensor:
        assert self.mask[0] is not None
        position = torch.arange(self.case.length)
        return (position <= position[:, None]) & (position[:, None] < self.mask[0][:, :, None])

    def arguments(self, mask: tuple[Tensor | None, Tensor | None]) -> tuple[Any, ...]:
        end, survivors = (None, None) if self.case.is_bool else mask
        options = end, survivors, self.case.head_dim**-0.5, 0.0, True, False
        return self.query, self.key, self.value, self.bool_mask, self.score[:, :, None], *options

    def saving_forward(self) -> tuple[Tensor, Tensor, Tensor]:
        return operators.forward_saving(*self.arguments(self.mask))

    def forward(self, mask: tuple[Tensor | None, Tensor | None] | None = None) -> tuple[Tensor, Tensor]:
        return operators.forward(*self.arguments(mask or self.mask))

    def backward(self, deterministic: bool = False) -> tuple[Tensor, ...]:
        is_bool = self.case.is_bool
        mask = (None, None) if is_bool else self.mask
        saved = self.query, self.key, self.value, self.out, self.lse, self.mask_bits
        masks = self.bool_mask, self.score[:, :, None], *mask
        options = self.case.head_dim**-0.5, 0.0, True, deterministic, True
        return operators.backward(self.grad_out, None, *saved, *masks, *options)

    def some(self, count: int = 16) -> Tensor:
        length = self.case.length
        return torch.unique(torch.cat([torch.randint(length, (count,)), torch.tensor([0, 1, length - 1])]))

    def exact(self, rows: Tensor, keys: Tensor) -> dict[str, Tensor]:
        """In float64: the tensors of these rows and keys, (Hk, G, rows, D) and (Hk, 1, keys, D), and the scores of each
        pair, (Hk, G, rows, keys)."""
        kv_heads, scale = self.case.kv_heads, self.case.head_dim**-0.5

        def of_rows(x: Tensor) -> Tensor:
            return x[0, rows].double().unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)

        def of_keys(x: Tensor) -> Tensor:
            return x[0, keys].double().transpose(0, 1)[:, None]

        tensors = {name: of_rows(getattr(self, name)) for name in ("query", "grad_out", "out")}
        tensors |= {name: of_keys(getattr(self, name)) for name in ("key", "value")}
        score = tensors["query"] @ tensors["key"].mT * scale + self.score[0][:, keys].double()[:, None, None]
        visible = keys <= rows[:, None]
        if self.mask[0] is not None:
            visible = visible & (rows[:, None] < self.mask[0][0][:, keys][:, None, None])
        return tensors | {"score": score.masked_fill(~visible, -torch.inf)}

    def forward_errors(self) -> dict[str, float]:
        rows = self.some()
        exact = self.exact(rows, torch.arange(self.case.length))
        lse = exact["score"].logsumexp(-1, keepdim=True)
        out = (exact["score"] - lse).exp() @ exact["value"]
        got = self.lse[0].unflatten(0, (self.case.kv_heads, -1))[..., rows, None]
        return {"out": relative(exact["out"], out), "lse": relative(got, lse)}

    def backward_errors(self, gradients: tuple[Tensor, ...]) -> dict[str, float]:
        kv_heads, scale = self.case.kv_heads, self.case.head_dim**-0.5

        def scores(rows: Tensor, keys: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
            exact = self.exact(rows, keys)
            lse = self.lse[0].unflatten(0, (kv_heads, -1))[..., rows, None].double()
            probability = (exact["score"] - lse).exp()
            delta = (exact["grad_out"] * exact["out"]).sum(-1, keepdim=True)
            return exact, probability, probability * (exact["grad_out"] @ exact["value"].mT - delta)

        query, key, value, bias = gradients
        every, rows, keys = torch.arange(self.case.length), self.some(), self.some()
        exact, _, slope = scores(rows, every)
        of_rows = query[0, rows].unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)
        errors = {"query": relative(of_rows, slope @ exact["key"] * scale)}
        exact, probability, slope = scores(every, keys)
        errors["key"] = relative(key[0, keys].transpose(0, 1), (slope.mT @ exact["query"]).sum(1) * scale)
        errors["value"] = relative(value[0, keys].transpose(0, 1), (probability.mT @ exact["grad_out"]).sum(1))
        errors["bias"] = relative(bias[0, :, 0, keys], slope.sum((1, 2)))
        return errors


def relative(x: Tensor, exact: Tensor) -> float:
    error = float((x.double() - exact).abs().max() / exact.abs().max())
    return error if error == error else float("inf")


def longest_kernel(function: Callable[[], object], calls: int = 5) -> tuple[str, float]:
    """Its name, and milliseconds."""
    function()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(calls):
            function()
        torch.cuda.synchronize()
    longest = max(profile.key_averages(), key=lambda event: event.self_device_time_total)
    return longest.key.removeprefix("flash_dmattn_"), longest.self_device_time_total / longest.count / 1e3


def time_of(name: str, function: Callable[[], object], flops: float) -> dict[str, float]:
    ms = median_ms(function, repeats=7)
    return {f"{name}_ms": ms, f"{name}_tflops": flops / ms / 1e9}


def sustained_ms(function: Callable[[], object], seconds: float = 2) -> float:
    """The median of the last half of the calls that fill so much time: when the clock has sunk to where it stays."""
    spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        spans.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
        spans[-1][0].record()
        function()
        spans[-1][1].record()
        if len(spans) > 4:  # the host is a few calls ahead
            spans[-4][1].synchronize()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in spans[len(spans) // 2 :])


def kernel_of(name: str, function: Callable[[], object], flops: float) -> dict[str, object]:
    kernel, ms = longest_kernel(function)
    return {f"{name}_kernel": kernel, f"{name}_kernel_ms": ms, f"{name}_kernel_tflops": flops / ms / 1e9}


def cudnn(problem: Problem) -> dict[str, float]:
    """Dense and causal, without a bias; useful TFLOP/s are those of its own pairs."""
    group = problem.case.heads // problem.case.kv_heads
    heads_first = [problem.query, *(x.repeat_interleave(group, 2) for x in (problem.key, problem.value))]
    leaves = [x.transpose(1, 2).contiguous().detach().requires_grad_() for x in heads_first]
    grad_out = problem.grad_out.transpose(1, 2)
    length = problem.case.length
    flops = problem.case.batch * problem.case.head_dim * problem.case.heads * length * (length + 1) / 2
    with torch.enable_grad(), sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        times = time_of("cudnn_forward", lambda: F.scaled_dot_product_attention(*leaves, is_causal=True), 4 * flops)
        out = F.scaled_dot_product_attention(*leaves, is_causal=True)
        backward = time_of(
            "cudnn_backward", lambda: torch.autograd.grad(out, leaves, grad_out, retain_graph=True), 10 * flops
        )
    return times | backward


def measure(case: Case, with_peer: bool) -> dict[str, object]:
    problem = Problem(case)
    row: dict[str, object] = {"case": str(case), **asdict(case), "family": os.environ["FLASH_DMATTN_CUDA_FAMILY"]}
    errors = problem.forward_errors()
    for name, deterministic in (("", False), ("deterministic_", True)):
        gradients = problem.backward(deterministic)
        errors |= {f"{name}{which}": error for which, error in problem.backward_errors(gradients).items()}
    again = problem.backward(True)
    row["errors"] = errors
    row["same_bits"] = all(torch.equal(*both) for both in zip(gradients, again, strict=True))
    row["right"] = row["same_bits"] and max(errors.values()) < LARGEST_ERROR
    if case.length < 4096:
        return row
    flops = case.batch * case.head_dim * case.heads * case.pairs
    row |= time_of("forward", problem.forward, 4 * flops)
    if case.window and not case.is_bool:
        row |= time_of("mask_and_forward", lambda: problem.forward(problem.make_mask()), 4 * flops)
    if case.is_bool:
        row |= time_of("saving_forward", problem.saving_forward, 4 * flops)
    row |= time_of("backward", problem.backward, 10 * flops)
    row |= time_of("deterministic_backward", lambda: problem.backward(True), 10 * flops)
    row |= kernel_of("forward", problem.forward, 4 * flops)
    row |= kernel_of("backward", problem.backward, 10 * flops)
    if with_peer and case.length <= LONGEST_PEER:
        row |= cudnn(problem)
    if with_peer and case.length >= SHORTEST_SUSTAINED:
        row["sustained_mask_and_forward_ms"] = sustained_ms(lambda: problem.forward(problem.make_mask()))
        row["sustained_backward_ms"] = sustained_ms(problem.backward)
    return row


def run_family(cases: list[Case], with_peer: bool) -> int:
    right = True
    with torch.device("cuda"), torch.random.fork_rng():
        for case in cases:
            torch.manual_seed(0)
            try:
                with torch.no_grad(), torch.device("cuda"):
                    row = measure(case, with_peer)
            except Exception as error:
                row = {"case": str(case), "right": False, "failed": f"{type(error).__name__}: {error}".splitlines()[0]}
            right = right and bool(row["right"])
            print(json.dumps({k: float(f"{x:.4g}") if isinstance(x, float) else x for k, x in row.items()}), flush=True)
            torch.cuda.empty_cache()
    return 0 if right else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where to write the results as JSON")
    parser.add_argument("--cases", default="", help="a part of the names of those to run, such as 'N 32768 w 1024'")
    parser.add_argument("--families", nargs="+", choices=("hopper", "generic"), default=["hopper", "generic"])
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    cases = [case for case in CASES if options.cases in str(case)]
    if options.one:
        return run_family(cases, with_peer=options.one == "with-peer")
    right, rows = True, []
    for i, family in enumerate(options.families):
        command = [sys.executable, __file__, "--cases", options.cases, "--one", "alone" if i else "with-peer"]
        try:
            ran = subprocess.run(
                command,
                env={**os.environ, "FLASH_DMATTN_CUDA_FAMILY": family},
                stdout=subprocess.PIPE,
                text=True,
                timeout=PATIENCE,
            )
            printed, right = ran.stdout, right and ran.returncode == 0
        except subprocess.TimeoutExpired as ended:
            printed, right = (ended.stdout or b"").decode(), False
            rows.append({"family": family, "failed": f"ended after {PATIENCE} s"})
        print(printed, end="", flush=True)
        rows.extend(json.loads(line) for line in printed.splitlines() if line.startswith("{"))
    if options.out:
        options.out.write_text(json.dumps({"machine": machine(), "results": rows}, indent=1) + "\n")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
