"""The Triton kernels compile for GPUs of either maker, and on tensor cores; none need be there."""

import pytest
import torch

from flash_dmattn.problem import Problem

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="the interpreter compiles nothing")

B, N, H, HK, W = 1, 4096, 4, 2, 1024
KINDS = ("dynamic", "causal", "dense")


def problem(kind, dtype, head_dim, deterministic):
    query = torch.empty(B, N, H, head_dim, dtype=dtype)
    key, value = torch.empty(2, B, N, HK, head_dim, dtype=dtype)
    bias = torch.empty(1, H if kind == "dense" else HK, N if kind == "dense" else 1, N)
    mask = torch.empty(1, 1, N, N, dtype=torch.bool) if kind == "dense" else None
    end = survivors = None
    if kind == "dynamic":
        end = torch.empty(B, HK, N, dtype=torch.int32)
        survivors = torch.empty(B, HK, N // 512, W, dtype=torch.int32)
    softcap = 30.0 if kind == "dense" else 0.0
    return Problem(query, key, value, mask, bias, end, survivors, 0.1, softcap, kind != "dense", deterministic)


def compile_for(target, kind, dtype, head_dim=128, deterministic=False):
    import triton_compiler
    from flash_dmattn.backends.triton import backward, forward, pairs

    made = problem(kind, dtype, head_dim, deterministic)
    with triton_compiler.compiling_for(target, first_only=True) as kernels:
        out, lse = forward.forward(made)
        backward.backward(made, out, lse, out, None, True)
        pairs.probabilities(made, lse)
    names = {name for name, _, _ in kernels}
    assert {"_forward", "_query_kernel", "_key_kernel", "_prepare_rows", "_probabilities"} <= names
    assert ("_list_keys" in names) == (kind != "causal")
    assert ("_bias_gradient" in names) == ("_pack_bits" in names) == (kind == "dense")
    return {name: compiled for name, _, compiled in kernels}


@pytest.mark.parametrize("kind", KINDS)
def test_hopper(kind):
    kernels = compile_for("sm_90", kind, torch.bfloat16, deterministic=kind == "dynamic")
    for name in ("_forward", "_query_kernel", "_key_kernel"):
        code = kernels[name].asm["ptx"]
        assert "wgmma.mma_async" in code and "cp.async.cg" in code, name
        assert kernels[name].metadata.shared <= 227 * 1024


def test_ampere():
    kernels = compile_for("sm_80", "dynamic", torch.float16, head_dim=64)
    assert all("mma.sync" in kernels[name].asm["ptx"] for name in ("_forward", "_query_kernel", "_key_kernel"))


def test_float32_is_multiplied_by_tensor_cores():
    """By one multiplication after the other the operands would not fit into registers."""
    kernels = compile_for("sm_90", "causal", torch.float32, head_dim=64)
    assert all("mma" in kernels[name].asm["ptx"] for name in ("_forward", "_query_kernel", "_key_kernel"))


def test_amd():
    if "amd" not in triton.backends.backends:
        pytest.skip("this Triton does not compile for AMD")
    kernels = compile_for("gfx942", "dynamic", torch.bfloat16)
    assert all("v_mfma" in kernels[name].asm["amdgcn"] for name in ("_forward", "_query_kernel", "_key_kernel"))
