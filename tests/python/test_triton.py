"""The Triton backend: on a GPU if there is one; with TRITON_INTERPRET=1 on the CPU, in sizes that suit Triton's
interpreter."""

import os

import pytest
import torch

import covering
import test_attention
from flash_dmattn import TRITON_AVAILABLE, triton_dmattn_func

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(not TRITON_AVAILABLE, reason="needs a GPU, or TRITON_INTERPRET=1")

FACTORS = {**test_attention.FACTORS, "dtype": (torch.float32, torch.bfloat16, torch.float16)}
if INTERPRETED:
    FACTORS |= {
        "lengths": ((1, 1), (1, 65), (1, 300), (2, 2), (3, 64), (63, 63), (65, 65), (64, 257), (129, 63), (33, 140)),
        "head_dim": (1, 7, 16, 33, 64),
    }
CASES = covering.covering_array(FACTORS, test_attention.fits)


@pytest.mark.parametrize("case", CASES, ids=test_attention.label)
def test_pairs(case):
    with torch.device("cpu" if INTERPRETED else "cuda"):
        test_attention.check(case, CASES.index(case), triton_dmattn_func)
