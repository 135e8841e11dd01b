"""The command `flash-dmattn`: what is installed, how fast it is here, and filling the kernel cache."""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

import flash_dmattn
from flash_dmattn import backends, cuda_kernels, flash_dmattn_func_auto, get_available_backends


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="flash-dmattn", description=flash_dmattn.__doc__)
    parser.add_argument("--version", action="version", version=f"flash_dmattn {flash_dmattn.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    commands.add_parser("info", help="backends, devices, kernels and cache").set_defaults(run=info)

    command = commands.add_parser(
        "bench",
        help="time attention against torch's own",
        description="Times causal attention, forward and backward: torch's own, this library's dense attention, and "
        "its dynamic mask with the gradient of the scores.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    command.add_argument("--lengths", type=_positive, nargs="+", default=[1024, 2048, 4096, 8192], metavar="N")
    command.add_argument("--window", type=_positive, default=1024, help="keep_window_size")
    command.add_argument("--batch", type=_positive, default=1)
    command.add_argument("--heads", type=_positive, default=8)
    command.add_argument("--kv-heads", type=_positive, default=4)
    command.add_argument("--head-dim", type=_positive, default=64)
    command.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    command.add_argument("--repeats", type=_positive, default=3, help="the median of so many runs counts")
    command.add_argument("--plot", type=Path, metavar="FILE", help="also draw the times; needs matplotlib")
    command.set_defaults(run=bench)

    command = commands.add_parser(
        "precompile",
        help="compile CUDA kernels ahead of time",
        description="Compiles the CUDA kernels into the folder that `info` names, for GPUs that need not be present, "
        "and reports what they take. Fails if one takes more local memory (register spills) than it is known to.",
    )
    command.add_argument("--arch", nargs="+", action="extend", required=True, metavar="ARCH", help="for example sm_90a")
    command.add_argument("--dtype", nargs="+", action="extend", choices=cuda_kernels.DTYPES, help="default: both")
    command.add_argument("--head-dim", nargs="+", action="extend", type=_head_dim, metavar="D", help="default: all")
    command.add_argument("--covering", action="store_true", help="few kernels in which each pair of options is there")
    command.add_argument("--jobs", type=_positive, default=os.cpu_count(), metavar="N", help="default: one per core")
    command.set_defaults(run=precompile)

    options = parser.parse_args(arguments)
    return options.run(options)


def info(options: argparse.Namespace) -> int:
    print(f"flash_dmattn {flash_dmattn.__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    print("backends, best first:")
    get_available_backends()  # tries them
    print(backends.describe())
    print("devices:")
    print(f"  cpu     {torch.get_num_threads()} threads")
    for index in range(torch.cuda.device_count()):
        missing = torch.ops.flash_dmattn.cuda_missing(index)
        print(f"  cuda:{index}  {torch.cuda.get_device_name(index)}{missing and ': ' + missing}")
    print("kernels:")
    print(f"  cpu     compiled in; this machine runs those for {torch.ops.flash_dmattn.cpu_instruction_set()}")
    print(f"  cuda    {_cuda_compiler()}")
    folder, files = cuda_kernels.cached()
    size = sum(file.stat().st_size for file in files)
    print(f"cache:    {folder or 'none: neither FLASH_DMATTN_CACHE_DIR nor HOME is set'}")
    print(f"          {len(files)} CUDA kernels, {size / 2**20:.1f} MB; those of flex are in TorchInductor's own")
    return 0


def bench(options: argparse.Namespace) -> int:
    if options.heads % options.kv_heads:
        return _error(f"--heads must be a multiple of --kv-heads, got {options.heads} and {options.kv_heads}")
    if options.plot is not None:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            return _error("--plot needs matplotlib: pip install matplotlib")
    attention = flash_dmattn_func_auto()
    columns: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
        "torch dense": _torch_dense,
        "dense": lambda query, key, value, score: attention(query, key, value, is_causal=True),
        f"dynamic mask {options.window}": lambda query, key, value, score: attention(
            query, key, value, attn_bias=score[:, :, None, :], is_causal=True, keep_window_size=options.window
        ),
    }
    name = torch.cuda.get_device_name(options.device) if options.device.startswith("cuda") else options.device
    print(
        f"{name}, {options.dtype}, B{options.batch} H{options.heads} Hk{options.kv_heads} D{options.head_dim}, causal; "
        f"milliseconds forward / backward, median of {options.repeats}"
    )
    print(f"{'N':>8}" + "".join(f"{column:>24}" for column in columns) + f"{'against torch':>16}")
    times: dict[str, list[float]] = {column: [] for column in columns}
    for length in options.lengths:
        line = f"{length:8}"
        for column, function in columns.items():
            forward, backward = _time(function, length, options)
            times[column].append(forward + backward)
            line += f"{1e3 * forward:13.1f} /{1e3 * backward:9.1f}"
        torch_dense, *_, dynamic = (column[-1] for column in times.values())
        print(f"{line}{torch_dense / dynamic:15.1f}x", flush=True)
    if options.plot is not None:
        _plot(options, times)
    return 0


def precompile(options: argparse.Namespace) -> int:
    try:
        cuda_kernels.compiler()
        kernels = cuda_kernels.kernels(
            options.arch,
            options.dtype or cuda_kernels.DTYPES,
            options.head_dim or cuda_kernels.HEAD_DIMS,
            options.covering,
        )
        start = time.perf_counter()
        compiled = {}
        for kernel, resources in cuda_kernels.compile_all(kernels, options.jobs):
            compiled[kernel] = resources
            if sys.stdout.isatty():
                print(f"\r{len(compiled)} of {len(kernels)} kernels", end="", flush=True)
    except (RuntimeError, ValueError) as error:
        return _error(str(error))
    print(f"\r{len(kernels)} kernels in {time.perf_counter() - start:.0f} s, in {cuda_kernels.cached()[0]}")
    if compiled:
        worst = max(compiled, key=lambda kernel: compiled[kernel].registers)
        print(f"most registers: {compiled[worst].registers}, {worst.name} for {worst.arch}")
    too_much = 0
    for kernel, resources in compiled.items():
        allowed = cuda_kernels.allowed_local_bytes(kernel)
        if resources.local_bytes > 0:
            print(f"local memory: {resources.local_bytes} bytes of {allowed} allowed, {kernel.name} for {kernel.arch}")
        too_much += resources.local_bytes > allowed
    if too_much:
        print(f"flash-dmattn: {too_much} kernels take too much local memory", file=sys.stderr)
    return 1 if too_much else 0


def _cuda_compiler() -> str:
    try:
        return f"compiled when first used, by {cuda_kernels.compiler()}"
    except RuntimeError as error:
        return f"cannot be compiled: {error}"


def _torch_dense(query: Tensor, key: Tensor, value: Tensor, score: Tensor) -> Tensor:
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).transpose(1, 2)


def _time(function: Callable[..., Tensor], length: int, options: argparse.Namespace) -> tuple[float, float]:
    """Median seconds forward and backward, after one run to warm up."""
    generator = torch.Generator(options.device).manual_seed(0)

    def random(*size: int) -> Tensor:
        dtype = getattr(torch, options.dtype)
        return torch.randn(size, generator=generator, dtype=dtype, device=options.device).requires_grad_()

    query = random(options.batch, length, options.heads, options.head_dim)
    key, value = (random(options.batch, length, options.kv_heads, options.head_dim) for _ in range(2))
    score = random(options.batch, options.kv_heads, length)
    forward, backward = [], []
    for _ in range(options.repeats + 1):
        start = _now(options.device)
        out = function(query, key, value, score)
        middle = _now(options.device)
        out.backward(torch.ones_like(out))
        forward.append(middle - start)
        backward.append(_now(options.device) - middle)
    return median(forward[1:]), median(backward[1:])


def _now(device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _plot(options: argparse.Namespace, times: dict[str, list[float]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    axes = figure.subplots()
    for column, seconds in times.items():
        axes.loglog(options.lengths, [1e3 * second for second in seconds], marker="o", label=column)
    axes.set(xlabel="sequence length", ylabel="milliseconds, forward and backward")
    axes.legend()
    figure.savefig(options.plot, dpi=120)
    print(f"plot: {options.plot}")


def _positive(text: str) -> int:
    value = int(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"must be positive, got {value}")
    return value


def _head_dim(text: str) -> int:
    if int(text) not in cuda_kernels.HEAD_DIMS:
        raise argparse.ArgumentTypeError(f"must be a multiple of 8 from 8 to 256, got {text}")
    return int(text)


def _error(message: str) -> int:
    print(f"flash-dmattn: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
