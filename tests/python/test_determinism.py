"""deterministic=True: the same bits on every run and for any number of threads, forward and backward."""

import pytest
import torch

from devices import generator as make_generator
from devices import on_gpu
from flash_dmattn import DynamicMask, flash_dmattn_func

pytestmark = pytest.mark.usefixtures("device")
RUNS, RUNS_ON_GPU = 20, 50
THREADS = (1, 2, 3, 5, 8)


@pytest.fixture
def restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def arguments(kind, dtype):
    """Leaves, then a function that makes the arguments beside query, key and value of them."""
    generator = make_generator(0)
    length = 2600 if on_gpu() else 650  # what several blocks add to
    query_len, key_len, heads, kv_heads, head_dim = (
        (2, 2100, 4, 2, 40) if kind == "decode" else (length, length, 4, 2, 40)
    )

    def random(*size):
        return torch.randn(size, generator=generator).to(dtype).requires_grad_()

    leaves = [
        random(2, query_len, heads, head_dim),
        random(2, key_len, kv_heads, head_dim),
        random(2, key_len, kv_heads, head_dim),
    ]
    score = (torch.randn(2, kv_heads, key_len, generator=generator) * 4).round().to(dtype)
    per_key = score[:, :, None].clone().requires_grad_()
    if kind in ("causal", "decode"):
        return leaves, {"is_causal": True}
    if kind == "per_key_bias":
        return [*leaves, per_key], {"attn_bias": per_key}
    if kind == "full_bias":
        bias = random(1, heads, query_len, key_len)
        return [*leaves, bias], {"attn_bias": bias, "is_causal": True, "softcap": 5.0}
    if kind == "dense_mask":
        bias = random(1, 1, query_len, 1)
        mask = torch.rand(1, heads, query_len, key_len, generator=generator) < 0.3
        return [*leaves, bias], {"attn_bias": bias, "attn_mask": mask}
    mask = DynamicMask.from_score(score, 100)
    return [*leaves, per_key], {"attn_bias": per_key, "attn_mask": mask}


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
@pytest.mark.parametrize("kind", ("causal", "decode", "per_key_bias", "full_bias", "dense_mask", "dynamic_mask"))
def test_same_bits(kind, dtype, restore_threads):
    leaves, options = arguments(kind, dtype)
    grad_out = torch.randn(leaves[0].shape, generator=make_generator(1)).to(dtype)
    first = None
    for run in range(RUNS_ON_GPU if on_gpu() else RUNS):
        torch.set_num_threads(THREADS[run % len(THREADS)])
        out, lse, probs = flash_dmattn_func(*leaves[:3], **options, deterministic=True, return_attn_probs=True)
        grads = torch.autograd.grad([out, lse], leaves, [grad_out, torch.ones_like(lse)])
        results = [out.detach(), lse.detach(), probs, *grads]
        first = first or results
        assert all(torch.equal(x, y) for x, y in zip(results, first, strict=True)), f"run {run}"


@pytest.mark.parametrize("is_causal", (False, True))
def test_same_mask(is_causal, restore_threads):
    score = torch.randint(50, (3, 2, 5000), generator=make_generator(2)).bfloat16()
    first = DynamicMask.from_score(score, 200, is_causal=is_causal).end
    for threads in THREADS:
        torch.set_num_threads(threads)
        assert torch.equal(DynamicMask.from_score(score, 200, is_causal=is_causal).end, first)
