"""Nothing of size Q x K is allocated: the peak of a long sequence is a small multiple of its inputs."""

import subprocess
import sys
from pathlib import Path

import pytest

LENGTH, HEADS, KV_HEADS, HEAD_DIM = 16384, 2, 1, 16
INPUTS = 4 * LENGTH * HEAD_DIM * (HEADS + 2 * KV_HEADS)
# Outputs, gradients, gathered rows and accumulators of some threads; one bool per pair would be 256 MiB per head.
ALLOWED = 8 * INPUTS + (24 << 20)

PROGRAM = f"""
import re, sys
from pathlib import Path
import torch
from flash_dmattn import DynamicMask, flash_dmattn_func
torch.set_num_threads(2)

def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

def step(kind, length):
    query = torch.randn(1, length, {HEADS}, {HEAD_DIM}, requires_grad=True)
    key, value = (torch.randn(1, length, {KV_HEADS}, {HEAD_DIM}, requires_grad=True) for _ in range(2))
    score = torch.randn(1, {KV_HEADS}, length, requires_grad=True)
    bias = (2 * score)[:, :, None, :].expand(-1, -1, length, -1)
    few = torch.rand(1, 1, 1, length) < 0.05
    options = {{
        "causal": dict(is_causal=True),
        "per_key_mask": dict(attn_mask=few),
        "expanded_mask": dict(attn_mask=few.expand(1, {HEADS}, length, length), is_causal=True),
        "dynamic_mask": dict(attn_mask=DynamicMask.from_score(score.detach(), 64), attn_bias=bias),
        "intersection": dict(
            attn_mask=DynamicMask.from_score(score.detach(), 64, is_causal=False), attn_bias=bias, is_causal=True
        ),
        "window": dict(attn_bias=bias, keep_window_size=64, is_causal=True),
        "padding_and_window": dict(attn_mask=few, attn_bias=bias, keep_window_size=64, is_causal=True),
        "heads_of_padding_and_window": dict(
            attn_mask=few.expand(1, {HEADS}, 1, length), attn_bias=bias, keep_window_size=64, is_causal=True
        ),
    }}[kind]
    flash_dmattn_func(query, key, value, deterministic=True, **options).sum().backward()

kind = sys.argv[1]
step(kind, 256)
before = peak()
step(kind, {LENGTH})
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    "kind",
    (
        *("causal", "per_key_mask", "expanded_mask", "dynamic_mask", "intersection", "window", "padding_and_window"),
        "heads_of_padding_and_window",
    ),
)
def test_peak_is_linear(kind):
    result = subprocess.run([sys.executable, "-c", PROGRAM, kind], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < ALLOWED
