"""Writes the recorded figures into the README, between its markers: python benchmarks/report.py [--check]"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
BEGIN, END = "<!-- cpu-figures -->", "<!-- /cpu-figures -->"


def cpu_figures() -> str:
    recorded = json.loads((ROOT / "benchmarks/results/cpu.json").read_text())
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether the README has the recorded figures")
    options = parser.parse_args()
    text = README.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    new = f"{before}{BEGIN}\n{cpu_figures()}\n{END}{after}"
    if options.check and new != text:
        print(f"{README.name} does not have the recorded figures; run: python benchmarks/report.py", file=sys.stderr)
        return 1
    README.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
