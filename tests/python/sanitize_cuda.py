"""A small matrix that runs every CUDA kernel, for compute-sanitizer:

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python tests/python/sanitize_cuda.py [NAME ...]

Without caching, tensors are allocations of their own, whose bounds the sanitizer knows. Prints the cases that ran.
"""

import itertools
import sys

import torch

from flash_dmattn import DynamicMask, flash_dmattn_func

WINDOW = 20


def problem(dtype=torch.bfloat16, query_len=150, key_len=150, heads=2, kv_heads=1, head_dim=64, odd=False):
    """query, key, value and a gradient of the output; odd: slices of wider tensors, nowhere aligned."""

    def tensor(length, heads):
        x = torch.randn(1, length, heads, head_dim + 3 * odd, dtype=dtype)
        return (x[..., 1:-2] if odd else x).detach().requires_grad_()

    return tensor(query_len, heads), tensor(key_len, kv_heads), tensor(key_len, kv_heads), tensor(query_len, heads)


def step(inputs, *, attn_bias=None, **options):
    query, key, value, grad_out = inputs
    leaves = [query, key, value]
    if attn_bias is not None:
        leaves.append(attn_bias.requires_grad_())
    out, _, _ = flash_dmattn_func(query, key, value, attn_bias=attn_bias, return_attn_probs=True, **options)
    torch.autograd.grad(out, leaves, grad_out)


def score(key_len=150, heads=1, dtype=torch.float32):
    return (torch.randn(1, heads, key_len) * 4).round().to(dtype)


def per_key_bias(**options):
    return score(**options)[:, :, None].clone()


def dynamic(query_len=150, key_len=150, window=WINDOW, **options):
    return DynamicMask.from_score(score(key_len), window, query_len=query_len, **options)


CASES = {
    "none": lambda: step(problem()),
    "causal": lambda: step(problem(), is_causal=True),
    "causal-deterministic": lambda: step(problem(), is_causal=True, deterministic=True),
    "causal-odd": lambda: step(problem(odd=True, head_dim=37), is_causal=True),
    "fewer-keys": lambda: step(problem(query_len=150, key_len=33), is_causal=True),
    "bias": lambda: step(problem(), is_causal=True, attn_bias=per_key_bias()),
    "bias-of-heads": lambda: step(problem(), attn_bias=per_key_bias(heads=2, dtype=torch.bfloat16)),
    "full-bias": lambda: step(problem(dtype=torch.half), is_causal=True, attn_bias=torch.randn(1, 2, 150, 150)),
    "full-bias-broadcast": lambda: step(problem(), attn_bias=torch.randn(1, 1, 150, 1), deterministic=True),
    "softcap": lambda: step(problem(), is_causal=True, softcap=2.0, attn_bias=per_key_bias()),
    "dynamic": lambda: step(problem(), attn_mask=dynamic(), attn_bias=per_key_bias()),
    "dynamic-deterministic": lambda: step(problem(), attn_mask=dynamic(), attn_bias=per_key_bias(), deterministic=True),
    "dynamic-everywhere": lambda: step(problem(), attn_mask=dynamic(is_causal=False), is_causal=True),
    "dynamic-padded": lambda: step(
        problem(), attn_mask=DynamicMask.from_score(score(), 7, key_padding_mask=torch.rand(1, 150) < 0.8)
    ),
    "per-key-mask": lambda: step(problem(), attn_mask=torch.rand(1, 1, 1, 150) < 0.3),
    "dense-mask": lambda: step(problem(), attn_mask=torch.rand(1, 1, 150, 150) < 0.3, is_causal=True),
    "dense-mask-aligned": lambda: step(
        problem(key_len=160), attn_mask=torch.rand(1, 1, 150, 160) < 0.3, is_causal=True
    ),
    "dense-mask-odd": lambda: step(
        problem(), attn_mask=(torch.rand(1, 150, 151, 2) < 0.3)[:, :, 1:].permute(0, 3, 2, 1), is_causal=True
    ),
    "row-mask": lambda: step(problem(), attn_mask=torch.rand(1, 1, 150, 1) < 0.7),
    "best-of-rows": lambda: step(
        problem(), attn_bias=torch.randn(1, 1, 150, 150), is_causal=True, keep_window_size=WINDOW
    ),
    "decode": lambda: step(problem(query_len=1, key_len=700), is_causal=True),
    "decode-dynamic": lambda: step(
        problem(query_len=1, key_len=2500), attn_mask=dynamic(1, 2500, 600), attn_bias=per_key_bias(key_len=2500)
    ),
    # More tiles of rows than a GPU has multiprocessors: blocks that stay have several.
    "many-heads": lambda: step(
        problem(query_len=100, key_len=100, heads=300, kv_heads=300),
        attn_mask=dynamic(100, 100),
        attn_bias=per_key_bias(key_len=100, heads=300),
    ),
    "wide-heads": lambda: step(problem(head_dim=256), is_causal=True),
    "long-mask": lambda: dynamic(5000, 5000, 300),
    "long-windows": lambda: dynamic(3000, 3000, 2500),
    "empty": lambda: [step(problem(query_len=q, key_len=k)) for q, k in itertools.product((0, 3), repeat=2)],
}


def main() -> None:
    torch.manual_seed(0)
    for name in sys.argv[1:] or CASES:
        CASES[name]()
        torch.cuda.synchronize()
        print(name, flush=True)


if __name__ == "__main__":
    with torch.device("cuda"):
        main()
