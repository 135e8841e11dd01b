"""Writes what was recorded into the README, between its markers: python benchmarks/report.py [--check]"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"


def cpu_figures(recorded: dict) -> str:
    machine = recorded["machine"]
    lines = [
        f"{machine['cpu']}, {machine['threads']} threads, instruction set `{machine['instruction_set']}`, "
        f"PyTorch {machine['torch']}, {machine['date']}, commit {machine['commit'][:10]}; {machine['shape']}. "
        "The peer is dense `scaled_dot_product_attention` on the same inputs, in the same run.",
        "",
        "| case | this library | peer | times as fast |",
        "|---|---|---|---|",
    ]
    for row in recorded["results"]:
        if "value" in row:
            lines.append(f"| {row['case']} | {row['value']:.2f} {row['unit']} | | |")
        elif "peer_ms" in row:
            lines.append(
                f"| {row['case']} | {row['ms']:.1f} ms | {row['peer_ms']:.1f} ms | {row['times_as_fast']:.2f} |"
            )
        else:
            lines.append(f"| {row['case']} | {row['ms']:.1f} ms | | |")
    return "\n".join(lines)


def cuda_figures(recorded: dict) -> str:
    machine = recorded["machine"]
    described = (
        f"{machine['gpu']}, driver {machine['driver']}, PyTorch {machine['torch']}, CUDA {machine['cuda']}, "
        f"{machine['date']}, commit {machine['commit'][:10]}; {machine['shape']}. SDPA is dense and causal, without a "
        "bias; FlexAttention is the `flex` backend, with the same mask and bias. TFLOP/s count visible pairs only."
    )
    return "\n".join((described, "", *figures_and_peers(recorded, "this library")))


def backend_figures(recorded: dict, backend: str, program: str) -> str:
    machine = recorded["machine"]
    described = (
        f"The `{backend}` backend, by `python benchmarks/{program}`. {machine['gpu']}, PyTorch {machine['torch']}, "
        f"{machine['date']}, commit {machine['commit'][:10]}; {machine['shape']}. SDPA is dense and causal, without a "
        "bias. TFLOP/s count visible pairs only."
    )
    return "\n".join((described, "", *figures_and_peers(recorded, f"`{backend}`")))


def figures_and_peers(recorded: dict, measured: str) -> list[str]:
    lines = [f"| case | {measured} | TFLOP/s | others |", "|---|---|---|---|"]
    for row in (row for row in recorded["results"] if "failed" not in row):
        figure = milliseconds(row["ms"]) if "ms" in row else quantity(row["value"], row["unit"])
        tflops = f"{row['tflops']:.0f}" if "tflops" in row else ""
        peers = [
            f"{name} {'failed' if isinstance(time, str) else milliseconds(time)}"
            for name, time in row.get("peers", {}).items()
        ]
        lines.append(f"| {row['case']} | {figure} | {tflops} | {', '.join(peers)} |")
    return lines


def cuda_families_figures(recorded: dict) -> str:
    machine = recorded["machine"]
    by_family: dict[str, dict[str, dict]] = {}
    for row in recorded["results"]:
        by_family.setdefault(row["family"], {})[row["case"]] = row

    def both(row: dict, forward: str, backward: str) -> str:
        return f"{milliseconds(row[forward])} / {milliseconds(row[backward])}" if forward in row else ""

    lines = [
        f"{machine['gpu']}, driver {machine['driver']}, PyTorch {machine['torch']}, {machine['date']}, commit "
        f"{machine['commit'][:10]}; bfloat16, causal, with a per-key bias and its gradient. Forward / backward: making "
        "a dynamic mask counts with the forward pass. SDPA by cuDNN is dense, without mask or bias. TFLOP/s count "
        "visible pairs only.",
        "",
        "| case | Hopper's kernels | TFLOP/s | deterministic | generic kernels | SDPA cuDNN |",
        "|---|---|---|---|---|---|",
    ]
    for case, row in by_family["hopper"].items():
        if "forward_ms" not in row:
            continue
        forward = "mask_and_forward" if "mask_and_forward_ms" in row else "forward"
        lines.append(
            f"| {case} | {both(row, f'{forward}_ms', 'backward_ms')} "
            f"| {row[f'{forward}_tflops']:.0f} / {row['backward_tflops']:.0f} "
            f"| {milliseconds(row['deterministic_backward_ms'])} "
            f"| {both(by_family['generic'][case], f'{forward}_ms', 'backward_ms')} "
            f"| {both(row, 'cudnn_forward_ms', 'cudnn_backward_ms')} |"
        )
    sustained = [
        f"{case} {both(row, 'sustained_mask_and_forward_ms', 'sustained_backward_ms')}"
        for case, row in by_family["hopper"].items()
        if "sustained_backward_ms" in row
    ]
    if sustained:
        lines += ["", f"Once the clock has sunk, in a run of two seconds: {', '.join(sustained)}."]
    return "\n".join(lines)


def feature_table(recorded: dict[str, dict]) -> str:
    """`recorded`: by type of device, what tests/python/test_backends.py found on a machine that has one."""
    outcomes: dict[str, dict[str, str]] = {}  # by column ("flex cpu") and row
    for device, found in recorded.items():
        for row, by_column in found["rows"].items():
            for column, outcome in by_column.items():
                if column.endswith(f" {device}"):
                    outcomes.setdefault(column, {})[row] = outcome
    order = [f"{backend} {device}" for device in ("cuda", "cpu") for backend in ("cuda", "triton", "flex", "cpu")]
    columns = sorted(outcomes, key=order.index)
    where = "; ".join(
        f"{device.upper()} tensors {'on an ' + machine['gpu'] + ' ' if device == 'cuda' else ''}"
        f"under PyTorch {machine['torch']}, {machine['date']}, commit {machine['commit'][:10]}"
        for device, machine in ((device, found["machine"]) for device, found in recorded.items())
    )
    names = (f"`{backend}`, {device.upper()} tensors" for backend, device in (column.split() for column in columns))
    lines = [
        f"What the tests in `tests/python/test_backends.py` found. {where}.",
        "",
        f"| | {' | '.join(names)} |",
        "|---" * (1 + len(columns)) + "|",
    ]
    marks = {"passed": "✓", "skipped": "no", "failed": "✗", None: ""}
    for row in dict.fromkeys(row for found in recorded.values() for row in found["rows"]):
        lines.append(f"| {row} | {' | '.join(marks[outcomes[column].get(row)] for column in columns)} |")
    return "\n".join(lines)


def quantity(value: float, unit: str) -> str:
    return milliseconds(value) if unit == "ms" else f"{value:.3g} {unit}".strip()


def milliseconds(value: float) -> str:
    if value >= 1000:
        return f"{value / 1e3:.3g} s"
    return f"{1e3 * value:.0f} µs" if value < 0.1 else f"{value:.3g} ms"


FIGURES = {
    "cpu": cpu_figures,
    "cuda": cuda_figures,
    "cuda_families": cuda_families_figures,
    "cuda_triton": functools.partial(backend_figures, backend="triton", program="cuda_triton.py"),
    "flex": functools.partial(backend_figures, backend="flex", program="flex.py"),
}


def with_figures(text: str, name: str) -> str:
    """The README with the figures of benchmarks/results/{name}.json, if there are any, between their markers."""
    recorded = results(name)
    return text if recorded is None else between_markers(text, f"{name}-figures", FIGURES[name](recorded))


def with_features(text: str) -> str:
    recorded = {device: found for device in ("cuda", "cpu") if (found := results(f"features_{device}"))}
    return between_markers(text, "features", feature_table(recorded))


def results(name: str) -> dict | None:
    file = ROOT / f"benchmarks/results/{name}.json"
    return json.loads(file.read_text()) if file.exists() else None


def between_markers(text: str, name: str, part: str) -> str:
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, rest = text.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}\n{part}\n{end}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether the README has what was recorded")
    options = parser.parse_args()
    new = text = README.read_text()
    for name in FIGURES:
        new = with_figures(new, name)
    new = with_features(new)
    if options.check and new != text:
        print(f"{README.name} does not have what was recorded; run: python benchmarks/report.py", file=sys.stderr)
        return 1
    README.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
