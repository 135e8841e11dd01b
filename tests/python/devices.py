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
