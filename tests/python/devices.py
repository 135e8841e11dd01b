"""Where tests run: on the CPU, and on a GPU if there is one with kernels (the fixture `device` in conftest.py)."""

import torch

import flash_dmattn

DEVICES = ("cpu", "cuda") if flash_dmattn.CUDA_AVAILABLE else ("cpu",)
CUDA_DTYPES = (torch.bfloat16, torch.float16)


def generator(seed):
    """On the device of the test."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def on_gpu():
    return torch.get_default_device().type == "cuda"


def usual_dtype():
    return torch.bfloat16 if on_gpu() else torch.float32


def poison(megabytes=64):
    """Fills memory that torch will hand out with NaN, for whatever dtype: what a kernel leaves unwritten shows."""
    nan = 0x7FFF7FFF
    large = torch.full((megabytes << 18,), nan, dtype=torch.int32)
    small = [torch.full((size >> 2,), nan, dtype=torch.int32) for size in (512, 1 << 14, 1 << 20) for _ in range(16)]
    del large, small
