"""Random cases of attention against the float64 reference, forward and gradients, many of them:

    python tests/python/soak.py [--cases 5000] [--first 0] [--processes 8] [--device cuda] [--out FILE]

A case follows from its number alone. Prints those that fail, with what draws them again, and writes a summary as JSON.
"""

import argparse
import json
import multiprocessing
import random
import sys
import time

LENGTHS = (*range(1, 41), 63, 64, 65, 96, 97, 127, 128, 129, 191, 192, 193, 255, 256, 257, 300, 513, 700)
HEAD_DIMS = (24, 64, 72, 96, 128, 192, 250)  # on a GPU, each is kernels to compile


def draw(number, device):
    """The case of a number."""
    from test_attention import CUDA_DTYPES, FACTORS, fits

    dice = random.Random(number)
    case = {}
    levels_of = {**FACTORS, **({"dtype": CUDA_DTYPES, "head_dim": HEAD_DIMS} if device == "cuda" else {})}
    for name, levels in levels_of.items():
        if name == "lengths":
            case[name] = dice.choice(LENGTHS), dice.choice(LENGTHS)
        elif name == "head_dim" and device == "cpu":
            case[name] = dice.randint(1, 256)
        else:
            case[name] = dice.choice([level for level in levels if fits({**case, name: level})])
    return case


def run(arguments):
    """The numbers of one process: (number, what went wrong) of those that fail."""
    numbers, device = arguments
    import torch

    import test_attention

    torch.set_num_threads(1)
    failures = []
    with torch.device(device):
        for number in numbers:
            case = draw(number, device)
            try:
                test_attention.check(case, number)
            except Exception as error:
                failures.append((number, f"{type(error).__name__}: {error}"))
                print(f"case {number} failed: {test_attention.label(case)}: {error}", flush=True)
    return failures


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--out", help="file for the summary")
    options = parser.parse_args()
    start = time.monotonic()
    numbers = range(options.first, options.first + options.cases)
    parts = [(numbers[i :: options.processes], options.device) for i in range(options.processes)]
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        failures = [failure for failed in pool.map(run, parts, chunksize=1) for failure in failed]
    summary = {
        "cases": options.cases,
        "first": options.first,
        "device": options.device,
        "seconds": round(time.monotonic() - start),
        "failures": [{"case": number, "error": error} for number, error in sorted(failures)],
    }
    print(f"{options.cases} cases, {len(failures)} failed, in {summary['seconds']} s")
    if options.out:
        with open(options.out, "w") as file:
            json.dump(summary, file, indent=1)
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
