"""The CUDA kernels against torch's scaled_dot_product_attention (SDPA) and FlexAttention: same inputs, same run.

    python benchmarks/cuda_engine.py [--out benchmarks/results/cuda.json] [--cases NAME ...]

Prints a line for each figure and writes all of them, with the machine and the commit, as JSON. Times are medians by
CUDA events, of calls that wait in the GPU's queue, so that the host's time does not count. Outputs are compared with
float64 in some rows. A case that fails is reported and leaves the others alone. Exits with 1 if an output is wrong or a
case failed.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flash_dmattn import DynamicMask, flash_dmattn_func, flex_dmattn_func, operators

HEADS, KV_HEADS, HEAD_DIM = 16, 8, 128
WINDOW = 1024
DTYPE = torch.bfloat16
READS = 4.2e12  # bytes a second that an H200 copies in practice
SDPA = {"SDPA cuDNN": SDPBackend.CUDNN_ATTENTION, "SDPA FlashAttention": SDPBackend.FLASH_ATTENTION}

Rows = Iterator[dict]


def median_ms(function: Callable[[], object], repeats: int = 15) -> float:
    """The median of some samples, each of as many calls as take about 2 ms."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample(calls: int) -> float:
        torch.cuda._sleep(int(4e6 * (1 + host_ms * calls)))  # 2e6 cycles, about 1 ms; the host queues calls
        start.record()
        for _ in range(calls):
            function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / calls

    for _ in range(2):
        function()
    torch.cuda.synchronize()
    began = time.perf_counter()
    function()
    host_ms = 1e3 * (time.perf_counter() - began)
    calls = min(50, max(1, round(2 / sample(1))))
    return statistics.median(sample(calls) for _ in range(repeats))


def in_graph(function: Callable[[], Tensor]) -> Callable[[], object]:
    function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def kernels_ms(name: str, function: Callable[[], object]) -> float:
    """Milliseconds of the kernels of that name in a call."""
    function()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    return sum(
        event.time_range.elapsed_us() / 1e3 for event in profile.events() if event.name == f"flash_dmattn_{name}"
    )


def normal(*size: int, seed: int = 0, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.randn(size, generator=torch.Generator("cuda").manual_seed(seed), dtype=dtype)


def inputs(length: int, query_len: int | None = None) -> list[Tensor]:
    """query, key, value, leaves."""
    sizes = (query_len or length, HEADS), (length, KV_HEADS), (length, KV_HEADS)
    return [normal(1, *size, HEAD_DIM, seed=seed).requires_grad_() for seed, size in enumerate(sizes)]


def scores(length: int) -> Tensor:
    """A per-key bias, a leaf."""
    return normal(1, KV_HEADS, 1, length, seed=9, dtype=torch.float32).requires_grad_()


def error_of(out: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, visible: Callable) -> float:
    """Relative, in some rows, against float64: visible(rows) (1 | Hk, R, K)."""
    rows = torch.linspace(0, query.size(1) - 1, 32).long()
    group = HEADS // KV_HEADS
    expected = []
    for kv_head in range(KV_HEADS):
        q = query.detach()[0, rows, kv_head * group : (kv_head + 1) * group].double().transpose(0, 1)
        s = q @ key.detach()[0, :, kv_head].double().T * HEAD_DIM**-0.5
        if bias is not None:
            s = s + bias.detach()[0, kv_head, 0].double()
        seen = visible(rows)
        s = s.masked_fill(~seen[kv_head if seen.size(0) > 1 else 0], -torch.inf)
        expected.append((s.softmax(-1) @ value.detach()[0, :, kv_head].double()).transpose(0, 1))
    exact = torch.cat(expected, 1)
    return float((out.detach()[0, rows].double() - exact).norm() / exact.norm())


def largest_error(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """Relative, of tensors beside those of another backend."""
    return max(float((x.double() - y.double()).norm() / y.double().norm()) for x, y in zip(got, expected, strict=True))


def causal(query_len: int, key_len: int) -> Callable[[Tensor], Tensor]:
    position = torch.arange(key_len)
    return lambda rows: (position <= rows[:, None] + key_len - query_len)[None]


def under(mask: DynamicMask) -> Callable[[Tensor], Tensor]:
    _, _, query_len, key_len = mask.shape
    end = mask.end[0, :, None]
    return lambda rows: causal(query_len, key_len)(rows) & (rows[:, None] + key_len - query_len < end)


def visible_pairs(mask: DynamicMask) -> int:
    """Over all query heads."""
    key_len = mask.shape[3]
    return int((mask.end.clamp(max=key_len) - torch.arange(key_len)).sum()) * HEADS // KV_HEADS


def result(
    case: str, ms: float, *, pairs: int = 0, products: int = 2, error: float | None = None, **more: object
) -> dict:
    """`products`: matrix products of D times the pairs; each is 2 D operations a pair."""
    row: dict = {"case": case, "ms": ms, **more}
    if pairs:
        row["tflops"] = 2 * products * HEAD_DIM * pairs / ms / 1e9
    if error is not None:
        row |= {"error": error, "right": error < 1e-2}
    return row


def quantity(case: str, value: float, unit: str) -> dict:
    return {"case": case, "value": value, "unit": unit}


def peers(functions: dict[str, Callable[[], object]]) -> dict[str, float | str]:
    """Milliseconds, or why there are none."""
    times: dict[str, float | str] = {}
    for name, function in functions.items():
        try:
            times[name] = median_ms(function, repeats=5)
        except Exception as error:
            times[name] = f"{type(error).__name__}: {error}".splitlines()[0][:120]
    return times


class Sdpa:
    """Dense causal attention without a bias by one of SDPA's backends, on heads-first copies."""

    def __init__(self, backend: SDPBackend, query: Tensor, key: Tensor, value: Tensor) -> None:
        self.backend = backend
        self.leaves = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in (query, key, value)]
        self.grad_out = torch.randn_like(self.leaves[0])
        self.out: Tensor | None = None

    def forward(self) -> Tensor:
        with sdpa_kernel(self.backend):
            return F.scaled_dot_product_attention(*self.leaves, is_causal=True, enable_gqa=True)

    def backward(self) -> None:
        if self.out is None:
            self.out = self.forward()
        torch.autograd.grad(self.out, self.leaves, self.grad_out, retain_graph=True)


def without_gradients(function: Callable[[], object]) -> Callable[[], object]:
    return torch.no_grad()(function)


def mask() -> Rows:
    for length, window in ((8192, WINDOW), (32768, WINDOW), (32768, 2048), (1048576, WINDOW)):
        leaves, bias = inputs(length), scores(length)
        score = bias.detach()[:, :, 0]
        made = DynamicMask.from_score(score, window)

        def step(leaves: list = leaves, bias: Tensor = bias, made: DynamicMask = made) -> None:
            out = flash_dmattn_func(*leaves, attn_mask=made, attn_bias=bias)
            torch.autograd.grad(out, (*leaves, bias), out)

        ms = median_ms(lambda score=score, window=window: DynamicMask.from_score(score, window))
        lists = kernels_ms("SurvivorLists", step)
        case = f"dynamic mask from scores, N {length}, 8 heads, w {window}"
        yield result(case, ms)
        yield result(f"{case}, with the lists of the forward and the backward pass", ms + lists)


def dynamic(length: int = 32768) -> Rows:
    query, key, value = leaves = inputs(length)
    bias = scores(length)
    grad_out = torch.randn_like(query)
    options = {"attn_bias": bias, "is_causal": True}
    made = DynamicMask.from_score(bias.detach()[:, :, 0], WINDOW)
    pairs = visible_pairs(made)
    out = flash_dmattn_func(query, key, value, keep_window_size=WINDOW, **options)
    error = error_of(out, query, key, value, bias, under(made))
    dense = {name: Sdpa(backend, query, key, value) for name, backend in SDPA.items()}

    def flex() -> Tensor:
        made = DynamicMask.from_score(bias.detach()[:, :, 0], WINDOW)
        return flex_dmattn_func(query, key, value, attn_mask=made, attn_bias=bias, is_causal=True)

    def forward() -> object:
        return flash_dmattn_func(query, key, value, keep_window_size=WINDOW, **options)

    name = f"dynamic mask w {WINDOW}, N {length}, per-key bias"
    yield result(
        f"{name}, forward, mask included", median_ms(without_gradients(forward)), pairs=pairs, error=error,
        peers=peers({
            **{name: without_gradients(peer.forward) for name, peer in dense.items()},
            "FlexAttention": without_gradients(flex),
        }),
    )  # fmt: skip
    yield result(
        f"{name}, forward, mask given",
        median_ms(without_gradients(lambda: flash_dmattn_func(query, key, value, attn_mask=made, **options))),
        pairs=pairs,
    )
    wanted = (*leaves, bias)
    flex_out: list[Tensor] = []

    def flex_backward() -> None:
        if not flex_out:
            flex_out.append(flex())
        torch.autograd.grad(flex_out[0], wanted, grad_out, retain_graph=True)

    yield result(
        f"{name}, backward with bias gradient",
        median_ms(lambda: torch.autograd.grad(out, wanted, grad_out, retain_graph=True)), pairs=pairs, products=5,
        peers=peers({**{name: peer.backward for name, peer in dense.items()}, "FlexAttention": flex_backward}),
    )  # fmt: skip
    again = flash_dmattn_func(query, key, value, keep_window_size=WINDOW, deterministic=True, **options)
    yield result(
        f"{name}, backward with bias gradient, deterministic",
        median_ms(lambda: torch.autograd.grad(again, wanted, grad_out, retain_graph=True)),
        pairs=pairs,
        products=5,
    )


def dense(length: int = 8192) -> Rows:
    query, key, value = leaves = inputs(length)
    bias = scores(length)
    grad_out = torch.randn_like(query)
    pairs = HEADS * length * (length + 1) // 2
    others = {name: Sdpa(backend, query, key, value) for name, backend in SDPA.items()}
    for name, wanted, options in (("per-key bias", (*leaves, bias), {"attn_bias": bias}), ("no bias", leaves, {})):

        def forward(options: dict = options) -> Tensor:
            return flash_dmattn_func(query, key, value, is_causal=True, **options)

        out = forward()
        error = error_of(out, query, key, value, options.get("attn_bias"), causal(length, length))
        yield result(
            f"dense causal, {name}, N {length}, forward", median_ms(without_gradients(forward)), pairs=pairs,
            error=error, peers=peers({name: without_gradients(peer.forward) for name, peer in others.items()}),
        )  # fmt: skip
        yield result(
            f"dense causal, {name}, N {length}, backward",
            median_ms(lambda out=out, wanted=wanted: torch.autograd.grad(out, wanted, grad_out, retain_graph=True)),
            pairs=pairs, products=5, peers=peers({name: peer.backward for name, peer in others.items()}),
        )  # fmt: skip


def bool_mask(length: int = 8192) -> Rows:
    query, key, value = (x.detach() for x in inputs(length))
    made = DynamicMask.from_score(scores(length).detach()[:, :, 0], WINDOW)
    dense_mask = made.to_dense()
    out = flash_dmattn_func(query, key, value, dense_mask)
    ms = median_ms(lambda: flash_dmattn_func(query, key, value, dense_mask))
    given = median_ms(lambda: flash_dmattn_func(query, key, value, made))
    heads_first = [x.transpose(1, 2).contiguous() for x in (query, key, value)]
    expanded = dense_mask.repeat_interleave(HEADS // KV_HEADS, 1)
    name = f"bool mask (1, {KV_HEADS}, N, N), the {WINDOW} best of each row, N {length}, forward"
    yield result(
        name, ms, error=error_of(out, query, key, value, None, under(made)),
        peers=peers({
            "SDPA with the mask": lambda: F.scaled_dot_product_attention(
                *heads_first, attn_mask=expanded, enable_gqa=True
            )
        }),
    )  # fmt: skip
    read = 1e3 * dense_mask.numel() / READS
    yield quantity(f"{name}, over reading the mask once and the forward of the dynamic mask", ms / (read + given), "x")


def decode(length: int = 524288) -> Rows:
    query, key, value = (x.detach() for x in inputs(length, query_len=1))
    bias = scores(length).detach()
    made = DynamicMask.from_score(bias[:, :, 0], WINDOW, query_len=1)
    heads_first = [x.transpose(1, 2).contiguous() for x in (query, key, value)]

    def attend(**options: object) -> Tensor:
        return flash_dmattn_func(query, key, value, attn_bias=bias, is_causal=True, **options)

    error = error_of(attend(attn_mask=made), query, key, value, bias, under(made))
    sdpa = {
        "SDPA FlashAttention, dense": in_graph(lambda: F.scaled_dot_product_attention(*heads_first, enable_gqa=True))
    }
    yield result(
        f"decode, Q 1, K {length}, dynamic mask w {WINDOW} given, in a graph",
        median_ms(in_graph(lambda: attend(attn_mask=made))), error=error, peers=peers(sdpa),
    )  # fmt: skip
    yield result(f"decode, Q 1, K {length}, dense, in a graph", median_ms(in_graph(attend)))


def memory(length: int = 32768) -> Rows:
    leaves, bias = inputs(length), scores(length)
    grad_out = torch.randn_like(leaves[0])

    def step() -> tuple[Tensor, ...]:
        out = flash_dmattn_func(*leaves, attn_bias=bias, is_causal=True, keep_window_size=WINDOW)
        return out, *torch.autograd.grad(out, (*leaves, bias), grad_out)

    step()
    gc.collect()  # what other cases have left is not freed within the step
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = step()
    extra = torch.cuda.max_memory_allocated() - before - sum(x.nbytes for x in results)
    yield quantity(f"training step, N {length}, memory over inputs, outputs and gradients", extra / 1e9, "GB")


def million() -> Rows:
    window, per_token = 2048, []
    for length in (65536, 1048576):
        leaves, bias = inputs(length), scores(length)
        grad_out = torch.randn_like(leaves[0])

        def step(leaves: list = leaves, bias: Tensor = bias, grad_out: Tensor = grad_out) -> None:
            out = flash_dmattn_func(*leaves, attn_bias=bias, is_causal=True, keep_window_size=window)
            torch.autograd.grad(out, (*leaves, bias), grad_out)

        # The clock that a GPU's power allows sinks within the first second.
        end = time.perf_counter() + 1.5
        while time.perf_counter() < end:
            step()
            torch.cuda.synchronize()
        ms = median_ms(step, repeats=5)
        per_token.append(ms / length)
        yield result(f"dynamic mask w {window}, N {length}, mask, forward and backward", ms)
    yield quantity("the same, time per token at N 1048576 over that at 65536", per_token[1] / per_token[0], "x")


@contextlib.contextmanager
def without_default_device() -> Iterator[None]:
    """As most programs run: under a default device each function or attribute of a tensor takes a microsecond more."""
    torch.set_default_device(None)
    try:
        yield
    finally:
        torch.set_default_device("cuda")


def host_us(calls: dict[str, Callable[[], object]], *, gradients: bool = False) -> dict[str, float]:
    """Of each call, in turn, as a processor's speed changes by half within seconds."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    with torch.set_grad_enabled(gradients):
        for _ in range(40):
            for name, call in calls.items():
                torch.cuda.synchronize()
                start = time.perf_counter()
                for _ in range(25):
                    call()
                samples[name].append((time.perf_counter() - start) / 25)
    return {name: 1e6 * statistics.median(each[1:]) for name, each in samples.items()}


def host() -> Rows:
    """Wall clock of calls that nobody waits for."""
    leaves, leaf_bias = inputs(256), scores(256)
    query, key, value = (x.detach() for x in leaves)
    bias = leaf_bias.detach()
    score = bias[:, :, 0]
    made = DynamicMask.from_score(score, 64)
    heads_first = [x.transpose(1, 2).contiguous() for x in (query, key, value)]
    options = 0.1, 0.0, True, False
    out, lse = operators.forward(query, key, value, *[None] * 4, *options)
    rest = query, key, value, out, lse, *[None] * 5, *options, False

    class Operator(torch.autograd.Function):
        """What gradients cost, whoever asks for them."""

        @staticmethod
        def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, Tensor]:
            out, lse = operators.forward(*tensors, *[None] * 4, *options)
            ctx.save_for_backward(*tensors, out, lse)
            return out, lse

    calls = {
        "torch's SDPA": lambda: F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True),
        "torch's new_empty, twice": lambda: (query.new_empty(query.shape), query.new_empty(lse.shape)),
        "operator forward, causal": lambda: operators.forward(query, key, value, *[None] * 4, *options),
        "operator backward, causal": lambda: operators.backward(out, None, *rest),
        "operator forward, dynamic mask": lambda: operators.forward(
            query, key, value, None, bias, made.end, made.survivors, *options
        ),
        "operator dynamic_mask": lambda: operators.dynamic_mask(score, None, 64, 256, True),
        "operator probabilities": lambda: operators.probabilities(query, key, lse, *[None] * 4, *options[:3]),
        "flash_dmattn_func, causal": lambda: flash_dmattn_func(query, key, value, is_causal=True),
        "flash_dmattn_func, dynamic mask": lambda: flash_dmattn_func(query, key, value, made, bias),
        "flash_dmattn_func, keep_window_size": lambda: flash_dmattn_func(
            query, key, value, None, bias, is_causal=True, keep_window_size=64
        ),
        "flash_dmattn_func, return_attn_probs": lambda: flash_dmattn_func(
            query, key, value, is_causal=True, return_attn_probs=True
        ),
    }
    with_gradients = {
        "operator forward in an autograd.Function, causal": lambda: Operator.apply(*leaves),
        "flash_dmattn_func, causal": lambda: flash_dmattn_func(*leaves, is_causal=True),
        "flash_dmattn_func, dynamic mask": lambda: flash_dmattn_func(*leaves, made, leaf_bias),
    }
    with without_default_device():
        figures = host_us(calls)
        for name, us in host_us(with_gradients, gradients=True).items():
            figures[f"{name}, with gradients"] = us
    plain = "operator forward, causal", "flash_dmattn_func, causal"
    for name, us in host_us({name: calls[name] for name in plain}).items():
        figures[f"{name}, under a default device"] = us
    for name, us in figures.items():
        yield quantity(f"host time per call, {name}", us, "µs")


FIRST_CALL = """
import time, torch, sys
from flash_dmattn import DynamicMask, flash_dmattn_func
def attend(length, **options):
    query, key, value = (torch.randn(1, length, h, 128, device="cuda").bfloat16().requires_grad_() for h in (2, 1, 1))
    grad_out = torch.ones_like(query)
    torch.cuda.synchronize()
    start = time.perf_counter()
    out = flash_dmattn_func(query, key, value, is_causal=True)
    torch.cuda.synchronize()
    middle = time.perf_counter()
    torch.autograd.grad(out, (query, key, value), grad_out)
    torch.cuda.synchronize()
    return 1e3 * (middle - start), 1e3 * (time.perf_counter() - middle)
one = torch.ones(1, device="cuda", requires_grad=True)
torch.autograd.grad(one * one, one, one)  # PyTorch's own first time: with a gradient given, it imports much
print(*attend(8192), *attend(12000))
"""


def first_call() -> Rows:
    """Wall clock of a process's first forward and backward, with an empty kernel cache and with a full one."""
    with tempfile.TemporaryDirectory() as folder:
        # NVRTC has a cache of its own, too.
        environment = {**os.environ, "FLASH_DMATTN_CACHE_DIR": folder, "CUDA_CACHE_DISABLE": "1"}
        for cache in ("empty", "filled"):
            ran = subprocess.run([sys.executable, "-c", FIRST_CALL], env=environment, capture_output=True, text=True)
            if ran.returncode:
                raise RuntimeError(ran.stderr)
            times = [float(ms) for ms in ran.stdout.split()]
            for name, ms in zip(
                ("forward", "backward", "forward, other length", "backward, other length"), times, strict=True
            ):
                yield quantity(f"first call, kernel cache {cache}, {name}", ms, "ms")


CASES: dict[str, Callable[[], Rows]] = {
    "mask": mask,
    "dynamic": dynamic,
    "dense": dense,
    "bool-mask": bool_mask,
    "decode": decode,
    "memory": memory,
    "million": million,
    "host": host,
    "first-call": first_call,
}


def report(row: dict) -> None:
    line = f"{row['case']:<100}"
    if "ms" in row:
        line += f" {row['ms']:9.4f} ms"
    if "tflops" in row:
        line += f" {row['tflops']:6.0f} TFLOP/s"
    if "value" in row:
        line += f" {row['value']:9.2f} {row['unit']}"
    for name, ms in row.get("peers", {}).items():
        line += f"   {name} {ms if isinstance(ms, str) else format(ms, '.3f') + ' ms'}"
    if not row.get("right", True):
        line += f"   WRONG: relative error {row['error']:.1e}"
    if "failed" in row:
        line += f" FAILED: {row['failed']}"
    print(line, flush=True)


def run(name: str, case: Callable[[], Rows]) -> Rows:
    """The case's rows, the last of them its failure if it fails."""
    try:
        for row in case():
            report(row)
            yield row
    except Exception as error:
        traceback.print_exc()
        row = {"case": name, "failed": f"{type(error).__name__}: {error}".splitlines()[0]}
        report(row)
        yield row
    torch.cuda.empty_cache()


def machine() -> dict:
    def output_of(*command: str) -> str:
        with contextlib.suppress(OSError):
            return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
        return ""

    return {
        "date": datetime.date.today().isoformat(),
        "commit": os.environ.get("FLASH_DMATTN_COMMIT") or output_of("git", "rev-parse", "HEAD"),
        "gpu": torch.cuda.get_device_name(),
        "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0],
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "shape": f"B 1, H {HEADS}, Hk {KV_HEADS}, D {HEAD_DIM}, {str(DTYPE).removeprefix('torch.')}",
    }


def main(cases: dict[str, Callable[[], Rows]], description: str | None) -> int:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where to write the results as JSON")
    parser.add_argument("--cases", nargs="+", choices=cases, default=list(cases), help="default: all")
    options = parser.parse_args()
    described = machine()
    print(", ".join(f"{name} {value}" for name, value in described.items()))
    rows: list[dict] = []
    torch.set_default_device("cuda")
    for name in options.cases:
        start = time.perf_counter()
        rows.extend(run(name, cases[name]))
        print(f"  ({name}: {time.perf_counter() - start:.0f} s)", flush=True)
        if options.out:  # after each case: nothing is lost
            options.out.write_text(json.dumps({"machine": described, "results": rows}, indent=1) + "\n")
    return 0 if all(row.get("right", True) and "failed" not in row for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main(CASES, __doc__))
